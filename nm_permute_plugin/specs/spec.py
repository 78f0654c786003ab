# SPDX-License-Identifier: Apache-2.0
"""The permutation spec: which axes of which parameters move together, as strings."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor, nn

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs.conv1d import input_axis
from nm_permute_plugin.specs.grammar import FAMILIES
from nm_permute_plugin.specs.layer_names import merged
from nm_permute_plugin.specs.matching import MovedParameter, claim
from nm_permute_plugin.specs.sizes import HeadDim, Size, measure

Spec = Mapping[str, str]
"""``{"model.layers.{i}.mlp.down_proj.weight": "residual hidden.{i}", ...}``: one line a
parameter, one word an axis.

``_`` never moves, and may say why (``_output``); ``{i}`` is any number, ``{a,b}`` one of
several names; ``:heads`` follows a key/value head across its query heads; a name that
ends in ``?`` may be absent. ``a+b`` is an axis of fused weights, one after another: all as
long as each other, but for ``_:heads``, which is as long as the axis that follows the
space of values with ``:heads``. A first word ``{e}`` numbers the matrices of a packed
stack; ``hidden.{i}.{e}`` is then a space of each."""


@dataclass(frozen=True)
class Consumer:
    """
    A prunable linear whose input channels a space orders.

    :param name: the module's name
    :param queries: query heads that share one channel of the space, or runs of the whole
        space that stand one after another; 1 where every channel is read once
    :param head_dim: channels of a head or of a run, where ``queries`` is above 1
    """

    name: str
    queries: int = 1
    head_dim: int = 1

    def view(self, matrix: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "rows channels"]:
        """The matrix with one column a channel of the space, in the space's order."""
        if self.queries == 1:
            return matrix
        return rearrange(
            matrix,
            "out (head query dim) -> (query out) (head dim)",
            query=self.queries,
            dim=self.head_dim,
        )

    def unview(
        self, matrix: Shaped[Tensor, "rows channels"]
    ) -> Shaped[Tensor, "out in"]:
        """The inverse of ``view``."""
        if self.queries == 1:
            return matrix
        return rearrange(
            matrix,
            "(query out) (head dim) -> out (head query dim)",
            query=self.queries,
            dim=self.head_dim,
        )


@dataclass(frozen=True)
class Space:
    """
    Channels that may change places, and the pruned linears that read them.

    :param size: channels of the space
    :param segment: a channel stays inside its run of so many: a head, or all of them
    """

    name: str
    size: int
    segment: int
    consumers: tuple[Consumer, ...] = ()

    @property
    def family(self) -> str:
        """``hidden`` of ``hidden.3``."""
        return self.name.split(".")[0]


@dataclass(frozen=True)
class ResolvedSpec:
    """
    A spec that fits a model.

    :param parameters: every parameter of the model, and the buffers that the spec names,
        each once
    :param spaces: by name
    :param unordered: prunable linears whose input channels no space orders, and the word
        that the spec gives for it, perhaps empty
    """

    parameters: tuple[MovedParameter, ...]
    spaces: dict[str, Space]
    unordered: dict[str, str] = field(default_factory=dict)

    def listing(self, families: Collection[str] = FAMILIES) -> list[str]:
        """
        For every prunable linear which space orders its inputs, or why none does.

        Layers alike are in one line: ``hidden.{0-31} (...) layers.{0-31}.mlp.down_proj``.

        :param families: the kinds of spaces that are reordered
        """
        lines = [
            f"{space.name} ({space.size} channels) "
            f"{'orders' if space.family in families else 'could order, but is left out,'}"
            f" the inputs of {', '.join(merged(c.name for c in space.consumers))}"
            for space in self.spaces.values()
            if space.consumers
        ]
        lines += [
            f"no space orders the inputs of {name}: the spec keeps them in their places"
            + (f" ({reason})" if reason else "")
            for name, reason in self.unordered.items()
        ]
        return merged(lines)


def resolve(
    model: nn.Module,
    spec: Spec,
    pattern: NMPattern,
    prunable: Iterable[str],
    head_dim: HeadDim = None,
) -> ResolvedSpec:
    """
    Fit a spec to a model, or say which parameter does not fit.

    Every parameter, and every floating-point buffer that could hold channels, is claimed
    by exactly one line; axes of one space have one size, and no space stands alone; the
    input axes of prunable linears are multiples of M.

    :param prunable: names of the linears that will be pruned
    :param head_dim: channels of an attention head; needed where the spec says ``:heads``
    :raises ValueError: with the parameter's name, what was found and what to do
    """
    claims, sizes = measure(claim(model, spec), head_dim)
    inputs = {name: input_axis(model.get_submodule(name)) for name in prunable}
    consumers, unordered = _readers(claims, sizes, pattern, inputs)
    return ResolvedSpec(
        parameters=tuple(claims),
        spaces={
            name: Space(name, size.channels, size.segment, tuple(consumers[name]))
            for name, size in sizes.items()
        },
        unordered=unordered,
    )


def _readers(
    claims: list[MovedParameter],
    sizes: Mapping[str, Size],
    pattern: NMPattern,
    inputs: Mapping[str, int],
) -> tuple[dict[str, list[Consumer]], dict[str, str]]:
    consumers: dict[str, list[Consumer]] = defaultdict(list)
    unordered: dict[str, str] = {}
    for item in claims:
        for name in item.names:
            owner = name.removesuffix(".weight")
            if owner == name or owner not in inputs:
                continue
            axis, length = item.matrices[0][inputs[owner]], item.shape[inputs[owner]]
            spaces = {part.space for part in axis}
            if len(spaces) > 1:
                raise ValueError(
                    f"{name} reads channels of several spaces in one axis, which cannot "
                    f"be pruned in their orders; add {owner!r} to `ignore`"
                )
            space = spaces.pop()
            width = length if space is None else sizes[space].segment
            if width % pattern.m:
                raise ValueError(
                    f"{name} has its input channels in runs of {width}, which "
                    f"M={pattern.m} of mask_structure {pattern} does not divide. Use "
                    f"another mask_structure, or add {owner!r} to `ignore`."
                )
            if space is None:
                unordered[owner] = axis[0].reason
            else:
                times = length // sizes[space].channels
                consumers[space].append(
                    Consumer(owner, times, width) if times > 1 else Consumer(owner)
                )
    return consumers, unordered
