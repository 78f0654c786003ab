# SPDX-License-Identifier: Apache-2.0
"""The sizes of spaces, and how fused axes divide, from the shapes of the parameters."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nm_permute_plugin.specs.grammar import Axis, Part
from nm_permute_plugin.specs.matching import MovedParameter

HeadDim = int | Mapping[str, int] | None
"""Channels of an attention head; where towers differ, by how a space's name starts."""


@dataclass(frozen=True)
class Size:
    """
    :param channels: of a space
    :param segment: a channel stays inside its run of so many
    """

    channels: int
    segment: int


@dataclass
class _Found:
    """The lengths of the axes of one space, by parameter."""

    plain: dict[str, int] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)

    def add(self, part: Part, name: str) -> None:
        (self.heads if part.heads else self.plain)[name] = part.length


def measure(
    claims: Sequence[MovedParameter], head_dim: HeadDim
) -> tuple[list[MovedParameter], dict[str, Size]]:
    """
    The claims with the lengths of all parts, and the sizes of all spaces.

    :raises ValueError: for a fused axis that does not divide, axes of one space that
        differ, a space with one axis only, and heads that do not divide their space
    """
    found: dict[str, _Found] = defaultdict(_Found)
    for name, axis, length in _axes(claims):
        if len(axis) == 1 and axis[0].space is not None:
            found[axis[0].space].add(replace(axis[0], length=length), name)
    heads = {space: set(of.heads.values()) for space, of in found.items()}
    measured = [_measured(claim, heads) for claim in claims]
    for name, axis, _ in _axes(measured):
        for part in axis if len(axis) > 1 else ():
            if part.space is not None:
                found[part.space].add(part, name)
    return measured, {name: _size(name, of, head_dim) for name, of in found.items()}


def _axes(claims: Sequence[MovedParameter]) -> Iterator[tuple[str, Axis, int]]:
    """Every axis of every matrix: the parameter's name, the axis, its length."""
    for claim in claims:
        for axes in claim.matrices:
            for axis, length in zip(axes, claim.shape, strict=True):
                yield claim.names[0], axis, length


def _measured(claim: MovedParameter, heads: Mapping[str, set[int]]) -> MovedParameter:
    matrices = tuple(
        tuple(
            _divided(claim.names[0], axis, length, heads)
            for axis, length in zip(axes, claim.shape, strict=True)
        )
        for axes in claim.matrices
    )
    return replace(claim, matrices=matrices)


def _divided(name: str, axis: Axis, length: int, heads: Mapping[str, set[int]]) -> Axis:
    """The parts of an axis with their lengths: ``:heads`` known, the others equal."""
    if len(axis) == 1:
        return (replace(axis[0], length=length),)
    spaces = {part.space for part in axis if part.space is not None}
    known = {n for space in spaces for n in heads.get(space, ())}
    followers = sum(part.heads for part in axis)
    by_head = followers or axis[0].interleaved
    if by_head and (len(spaces) != 1 or len(known) != 1):
        of_head = (
            "a part ':heads'" if followers else "parts that take turns by head ('|')"
        )
        raise ValueError(
            f"{name} has {of_head} in a fused axis, but no other axis (or axes of "
            f"{len(known)} lengths) follows the space {', '.join(spaces)} with ':heads'"
        )
    following = max(known) if followers else 0
    rest = length - followers * following
    others = len(axis) - followers
    if rest <= 0 or rest % max(others, 1):
        raise ValueError(
            f"{name} has a fused axis of {length} channels, which its {len(axis)} parts "
            f"do not divide: {rest} channels are left for {others} equal parts"
        )
    return tuple(
        replace(part, length=following if part.heads else rest // others)
        for part in axis
    )


def _size(name: str, found: _Found, head_dim: HeadDim) -> Size:
    if not found.plain:
        consumer = next(iter(found.heads))
        raise ValueError(
            f"space {name} is read by {consumer} with ':heads' but written nowhere"
        )
    if len({*found.plain, *found.heads}) == 1:
        raise ValueError(
            f"space {name} is named by {next(iter(found.plain))} alone; channels are "
            "written by one parameter and read by another. Is the name misspelt?"
        )
    sizes = set(found.plain.values())
    if len(sizes) != 1:
        raise ValueError(
            f"the axes of space {name} differ in size: "
            + ", ".join(f"{parameter} has {n}" for parameter, n in found.plain.items())
        )
    channels = sizes.pop()
    if not found.heads:
        return Size(channels, segment=channels)
    dim = _head_dim(name, head_dim)
    if dim is None or channels % dim:
        raise ValueError(
            f"space {name} has {channels} channels, which heads of {dim} channels "
            "do not divide; check head_dim in the model's config"
        )
    for parameter, length in found.heads.items():
        if length % channels:
            raise ValueError(
                f"{parameter} has {length} channels, no multiple of the {channels} of "
                f"space {name} whose heads it shares"
            )
    return Size(channels, segment=dim)


def _head_dim(name: str, head_dim: HeadDim) -> int | None:
    if not isinstance(head_dim, Mapping):
        return head_dim
    starts = [start for start in head_dim if f"{name}.".startswith(f"{start}.")]
    return head_dim[max(starts, key=len)] if starts else None
