# SPDX-License-Identifier: Apache-2.0
"""The grammar of a permutation spec: a line a parameter, a word an axis."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

FAMILIES = ("residual", "hidden", "value")
"""The first part of every space's name: what kind of channels it holds."""

_FIXED = re.compile(r"_[a-z]*")
_SPACE = re.compile(rf"({'|'.join(FAMILIES)})(\.[a-z0-9_]+)*")


@dataclass(frozen=True)
class Part:
    """
    A run of channels along an axis: the space that orders it, if any does.

    :param heads: the run follows the space's key/value heads over their query heads; of
        a run that no space orders: it is as long as such a run
    :param length: channels of the run; 0 until it is measured
    :param reason: why no space orders it, in a word of the spec's author
    """

    space: str | None
    heads: bool = False
    length: int = 0
    reason: str = field(default="", compare=False)


Axis = tuple[Part, ...]
"""One part, or several where weights are fused, one after another."""


@dataclass(frozen=True)
class Line:
    """
    A line of a spec that fits a parameter.

    :param text: the line as it was written
    :param words: one an axis
    :param numbers: what ``{i}`` stands for in this parameter's name
    """

    text: str
    words: tuple[str, ...]
    numbers: Mapping[str, str]

    @property
    def counter(self) -> str | None:
        """The ``e`` of a first word ``{e}``: that axis numbers matrices of their own."""
        first = self.words[0] if self.words else ""
        return first[1:-1] if first[:1] == "{" and first[-1:] == "}" else None

    def axes(self, name: str, count: int | None = None) -> tuple[Axis, ...]:
        """
        The axes of the parameter; of its matrix ``count`` where an axis numbers them.

        :param name: the parameter's, for errors
        :raises ValueError: for a word that is none, and a space that is claimed twice
        """
        if count is None or self.counter is None:
            words, numbers = self.words, self.numbers
        else:
            words = self.words[1:]
            numbers = {**self.numbers, self.counter: str(count)}
        axes = tuple(_axis(word, numbers, name) for word in words)
        claimed = [space for axis in axes for space in {part.space for part in axis}]
        claimed = [space for space in claimed if space is not None]
        if len(claimed) != len(set(claimed)):
            raise ValueError(
                f"parameter {name}: the spec's line {self.text!r} claims a space twice: "
                f"{' '.join(self.words)!r}"
            )
        return axes


class Lines:
    """All lines of a spec, asked by parameter names; it notes which were used."""

    def __init__(self, spec: Mapping[str, str]) -> None:
        self._patterns = {line: _pattern(line) for line in spec}
        self._spec = spec
        self._used: set[str] = set()

    def of(self, name: str) -> Line | None:
        """
        The line that fits a parameter's name, or None.

        :raises ValueError: if two do
        """
        matches = [
            (line, found)
            for line, pattern in self._patterns.items()
            if (found := pattern.fullmatch(name))
        ]
        if len(matches) > 1:
            claims = ", ".join(repr(line) for line, _ in matches)
            raise ValueError(
                f"parameter {name} is claimed by {claims} of the permutation spec; each "
                "parameter needs exactly one"
            )
        for line, found in matches:
            self._used.add(line)
            return Line(line, tuple(self._spec[line].split()), found.groupdict())
        return None

    def refuse_unused(self) -> None:
        """
        See that every line without a ``?`` was asked for.

        :raises ValueError: naming the first that fits nothing
        """
        for line in self._spec:
            if line not in self._used and not line.endswith("?"):
                raise ValueError(
                    f"the spec's line {line!r} fits no parameter of the model; correct "
                    "the name, or end it in '?' if the parameter may be absent"
                )


def _axis(word: str, numbers: Mapping[str, str], name: str) -> Axis:
    return tuple(_part(text, word, numbers, name) for text in word.split("+"))


def _part(text: str, word: str, numbers: Mapping[str, str], name: str) -> Part:
    space, colon, suffix = text.partition(":")
    for key, number in numbers.items():
        space = space.replace("{" + key + "}", number)
    heads = suffix == "heads"
    if heads or not colon:
        if _FIXED.fullmatch(space) and (not heads or "+" in word):
            return Part(None, heads, reason=space[1:])
        if _SPACE.fullmatch(space):
            return Part(space, heads)
    raise ValueError(
        f"parameter {name}: {word!r} is no word of a permutation spec; write '_', "
        "'residual', 'hidden.{i}', 'value.{i}' or 'value.{i}:heads', and 'a+b' for "
        "fused weights"
    )


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
