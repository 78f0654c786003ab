# SPDX-License-Identifier: Apache-2.0
"""The permutation spec: which axes of which parameters move together, as strings."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor, nn

from nm_permute_plugin.maths.pattern import NMPattern

Spec = Mapping[str, str]
"""``{"model.layers.{i}.mlp.down_proj.weight": "residual hidden.{i}", ...}``: one line a
parameter, one word an axis. ``_`` never moves, ``{i}`` is any number, ``{a,b}`` one of
several names, ``:heads`` follows a key/value head across its query heads, and a name
that ends in ``?`` may be absent."""


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter: the space that orders it, if any does."""

    space: str | None
    heads: bool = False


@dataclass(frozen=True)
class MovedParameter:
    """A parameter under all its names (several, where tied), with its axes."""

    names: tuple[str, ...]
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Reader:
    """
    A prunable linear whose input channels a space orders.

    :param name: the module's name
    :param queries: query heads that share one channel of the space; 1 without GQA
    :param head_dim: channels of a head, where ``queries`` is above 1
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
    :param wall: a channel stays inside its run of so many: a head, or all of them
    """

    name: str
    size: int
    wall: int
    readers: tuple[Reader, ...] = ()

    @property
    def family(self) -> str:
        """``hidden`` of ``hidden.3``."""
        return self.name.split(".")[0]


@dataclass(frozen=True)
class ResolvedSpec:
    """
    A spec that fits a model.

    :param parameters: every parameter of the model, each once
    :param spaces: by name
    :param unordered: prunable linears whose input channels no space orders
    """

    parameters: tuple[MovedParameter, ...]
    spaces: dict[str, Space]
    unordered: tuple[str, ...] = ()


@dataclass
class _Sizes:
    """What the axes of one space say of its size."""

    plain: dict[str, int] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)


def resolve(
    model: nn.Module,
    spec: Spec,
    pattern: NMPattern,
    prunable: Iterable[str],
    head_dim: int | None = None,
) -> ResolvedSpec:
    """
    Fit a spec to a model, or say which parameter does not fit.

    Three checks: every parameter is claimed by exactly one line; axes of one space have
    one size; the input axes of prunable linears are multiples of M.

    :param prunable: names of the linears that will be pruned
    :param head_dim: channels of an attention head; needed where the spec says ``:heads``
    :raises ValueError: with the parameter's name, what was found and what to do
    """
    claimed = _claim(model, spec)
    sizes: dict[str, _Sizes] = defaultdict(_Sizes)
    for parameter, shape in claimed:
        for axis, length in zip(parameter.axes, shape, strict=True):
            if axis.space is not None:
                kind = (
                    sizes[axis.space].heads if axis.heads else sizes[axis.space].plain
                )
                kind[parameter.names[0]] = length
    spaces = {name: _space(name, found, head_dim) for name, found in sizes.items()}
    readers, unordered = _readers(claimed, spaces, pattern, set(prunable))
    return ResolvedSpec(
        parameters=tuple(parameter for parameter, _ in claimed),
        spaces={
            name: Space(name, space.size, space.wall, tuple(readers[name]))
            for name, space in spaces.items()
        },
        unordered=tuple(unordered),
    )


def _claim(
    model: nn.Module, spec: Spec
) -> list[tuple[MovedParameter, tuple[int, ...]]]:
    """Give every parameter its line; parameters that share storage stay together."""
    lines = [(_pattern(line), line, words) for line, words in spec.items()]
    names: dict[int, list[str]] = defaultdict(list)
    tensors: dict[int, Tensor] = {}
    for name, tensor in _all_parameters(model):
        names[_identity(tensor)].append(name)
        tensors[_identity(tensor)] = tensor
    used: set[str] = set()
    claimed = []
    for key, aliases in names.items():
        tensor = tensors[key]
        found = {alias: _axes_of(alias, tensor, lines, used) for alias in aliases}
        first, *others = found.values()
        for other in others:
            if other != first:
                raise ValueError(
                    f"tied parameters {', '.join(found)} move differently in the spec; "
                    "one tensor can have one order only"
                )
        claimed.append((MovedParameter(tuple(aliases), first), tuple(tensor.shape)))
    for line in spec:
        if line not in used and not line.endswith("?"):
            raise ValueError(
                f"the spec's line {line!r} fits no parameter of the model; correct the "
                "name, or end it in '?' if the parameter may be absent"
            )
    return claimed


def _identity(tensor: Tensor) -> int:
    """The same for tensors that share storage; offloaded ones have none."""
    return id(tensor) if tensor.is_meta else tensor.data_ptr()


def _axes_of(
    name: str,
    tensor: Tensor,
    lines: list[tuple[re.Pattern[str], str, str]],
    used: set[str],
) -> tuple[Axis, ...]:
    matches = [
        (line, words, found)
        for pattern, line, words in lines
        if (found := pattern.fullmatch(name))
    ]
    if len(matches) != 1:
        claims = ", ".join(repr(line) for line, _, _ in matches) or "no line"
        raise ValueError(
            f"parameter {name} {tuple(tensor.shape)} is claimed by {claims} of the "
            "permutation spec; each parameter needs exactly one. Give a complete spec "
            "as `spec:` in the recipe."
        )
    line, words, found = matches[0]
    used.add(line)
    axes = tuple(_axis(word, found.groupdict(), name) for word in words.split())
    if len(axes) != tensor.dim():
        raise ValueError(
            f"parameter {name} has {tensor.dim()} axes {tuple(tensor.shape)}, but the "
            f"spec's line {line!r} names {len(axes)}: {words!r}"
        )
    moved = [axis.space for axis in axes if axis.space is not None]
    if len(moved) != len(set(moved)):
        raise ValueError(f"the spec's line {line!r} claims a space twice: {words!r}")
    return axes


def _axis(word: str, numbers: dict[str, str], name: str) -> Axis:
    if word == "_":
        return Axis(None)
    space, _, suffix = word.partition(":")
    for key, number in numbers.items():
        space = space.replace("{" + key + "}", number)
    if suffix not in ("", "heads") or not re.fullmatch(
        r"[a-z_]+(\.[a-z0-9_]+)*", space
    ):
        raise ValueError(
            f"parameter {name}: {word!r} is no word of a permutation spec; write '_', "
            "'residual', 'hidden.{i}' or 'value.{i}:heads'"
        )
    return Axis(space, heads=suffix == "heads")


def _pattern(line: str) -> re.Pattern[str]:
    """A spec line as a regular expression; ``{i}`` becomes the group ``i``."""
    parts = re.split(r"\{([^}]*)\}", line.removesuffix("?"))
    out = [re.escape(parts[0])]
    for inside, after in zip(parts[1::2], parts[2::2], strict=True):
        if "," in inside:
            out.append("(?:" + "|".join(map(re.escape, inside.split(","))) + ")")
        elif inside.isidentifier() and f"(?P<{inside}>" not in "".join(out):
            out.append(rf"(?P<{inside}>\d+)")
        else:
            raise ValueError(
                f"the spec's line {line!r} has {{{inside}}}, which is no new name of a "
                "number; write {i}, or {a,b} for one of several names"
            )
        out.append(re.escape(after))
    return re.compile("".join(out))


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every parameter: a tied one comes once a name, the same object."""
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if not torch.is_floating_point(tensor):
            raise ValueError(
                f"parameter {name} is {tensor.dtype}: this model is quantized already. "
                "Order and prune the floating-point model, then quantize."
            )
        yield name, tensor


def _space(name: str, found: _Sizes, head_dim: int | None) -> Space:
    if not found.plain:
        reader = next(iter(found.heads))
        raise ValueError(
            f"space {name} is read by {reader} with ':heads' but written nowhere"
        )
    sizes = set(found.plain.values())
    if len(sizes) != 1:
        raise ValueError(
            f"the axes of space {name} differ in size: "
            + ", ".join(f"{parameter} has {n}" for parameter, n in found.plain.items())
        )
    size = sizes.pop()
    if not found.heads:
        return Space(name, size, wall=size)
    if head_dim is None or size % head_dim:
        raise ValueError(
            f"space {name} has {size} channels, which heads of {head_dim} channels "
            "do not divide; check head_dim in the model's config"
        )
    for parameter, length in found.heads.items():
        if length % size:
            raise ValueError(
                f"{parameter} has {length} channels, no multiple of the {size} of "
                f"space {name} whose heads it shares"
            )
    return Space(name, size, wall=head_dim)


def _readers(
    claimed: list[tuple[MovedParameter, tuple[int, ...]]],
    spaces: dict[str, Space],
    pattern: NMPattern,
    prunable: set[str],
) -> tuple[dict[str, list[Reader]], list[str]]:
    readers: dict[str, list[Reader]] = defaultdict(list)
    unordered = []
    for parameter, shape in claimed:
        for name in parameter.names:
            owner = name.removesuffix(".weight")
            if owner == name or owner not in prunable:
                continue
            axis = parameter.axes[-1]
            space = spaces[axis.space] if axis.space is not None else None
            width = space.wall if space is not None else shape[-1]
            if width % pattern.m:
                raise ValueError(
                    f"{name} has its input channels in runs of {width}, which "
                    f"M={pattern.m} of mask_structure {pattern} does not divide. Use "
                    f"another mask_structure, or add {owner!r} to `ignore`."
                )
            if space is None:
                unordered.append(owner)
            elif axis.heads:
                queries = shape[-1] // space.size
                readers[space.name].append(Reader(owner, queries, space.wall))
            else:
                readers[space.name].append(Reader(owner))
    return readers, unordered
