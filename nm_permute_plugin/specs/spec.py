# SPDX-License-Identifier: Apache-2.0
"""A permutation spec says in strings which axes of which parameters move together."""

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
"""The lines and words of ``grammar``, a line a parameter and a word an axis, such as
``{"model.layers.{i}.mlp.down_proj.weight": "residual hidden.{i}", ...}``."""


@dataclass(frozen=True)
class Consumer:
    """
    A prunable linear whose input channels a space orders.

    :param name: the module's name
    :param queries: how often each channel of the space appears in the input axis: query
        heads per key/value head, or repeats of a concatenated input; usually 1
    :param head_dim: the channels of a head, or of one repeat; unused if ``queries`` is 1
    """

    name: str
    queries: int = 1
    head_dim: int = 1

    def view(self, matrix: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "rows channels"]:
        """Give the matrix one column a channel of the space, ``queries`` rows an output."""
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
        """Undo ``view``."""
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

    :param size: the number of channels
    :param segment: the channels of a run that none may leave: a head, or the whole space
    """

    name: str
    size: int
    segment: int
    consumers: tuple[Consumer, ...] = ()

    @property
    def family(self) -> str:
        """The kind of channels, as ``hidden`` of ``hidden.3``; one of ``FAMILIES``."""
        return self.name.split(".")[0]


@dataclass(frozen=True)
class ResolvedSpec:
    """
    A spec that fits a model.

    :param parameters: every parameter of the model and every buffer that the spec names,
        each once
    :param spaces: all spaces by their names
    :param unordered: the prunable linears whose input channels no space orders, with the
        reason that the spec gives, perhaps empty
    """

    parameters: tuple[MovedParameter, ...]
    spaces: dict[str, Space]
    unordered: dict[str, str] = field(default_factory=dict)

    def listing(self, families: Collection[str] = FAMILIES) -> list[str]:
        """
        Say of every prunable linear which space orders its inputs, or why none does.

        Layers alike are in one line: ``hidden.{0-31} (...) layers.{0-31}.mlp.down_proj``.

        :param families: the kinds of spaces that are reordered
        """
        left_out = "could permute, but is left out,"
        lines = [
            f"{space.name} ({space.size} channels) "
            f"{'permutes' if space.family in families else left_out} the inputs of "
            f"{', '.join(merged(c.name for c in space.consumers))}"
            for space in self.spaces.values()
            if space.consumers
        ]
        lines += [
            f"no space permutes the inputs of {name}: the spec keeps them in their places"
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
    with_values: bool = True,
) -> ResolvedSpec:
    """
    Fit a spec to a model, or say which parameter does not fit.

    Every parameter, and every floating-point buffer that could hold channels, is claimed
    by exactly one line; axes of one space have one size, and no space stands alone; the
    input axes of prunable linears are multiples of M.

    :param prunable: the names of the linears that will be pruned
    :param head_dim: the channels of an attention head; needed where a word has ``:heads``
    :param with_values: refuse parameters on the meta device, which have no values
    :raises ValueError: if something does not fit; the error names the parameter, says what
        was found and what to do
    """
    claims, sizes = measure(claim(model, spec, with_values), head_dim)
    inputs = {name: input_axis(model.get_submodule(name)) for name in prunable}
    consumers, unordered = _consumers(claims, sizes, pattern, inputs)
    return ResolvedSpec(
        parameters=tuple(claims),
        spaces={
            name: Space(name, size.channels, size.segment, tuple(consumers[name]))
            for name, size in sizes.items()
        },
        unordered=unordered,
    )


def _consumers(
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
                    f"be pruned under their permutations; add {owner!r} to `ignore`"
                )
            space = spaces.pop()
            width = length if space is None else sizes[space].segment
            if width % pattern.m:
                raise ValueError(
                    f"{name} has its input channels in segments of {width}, which "
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
