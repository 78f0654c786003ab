# SPDX-License-Identifier: Apache-2.0
"""
The grammar of a permutation spec: each line names parameters, each word an axis.

A *space* is a set of axes whose channels move together. Its name begins with its family:

``residual``, the stream between the layers
    Moves: the columns of the embeddings; all norms; the columns of everything that reads
    the stream, the rows of everything that adds to it.
    Freedom: any order, one for the whole model (or tower).
    Consumers: q, k, v, gate and up of every layer, and the head.
    Why: sums and norms treat all channels alike, so that they do not see the order.
``hidden.{i}``, the channels inside the MLP of a layer (``hidden.{i}.{e}``: of an expert)
    Moves: the rows and biases of gate and up; the columns of down.
    Freedom: any order, another in every layer.
    Consumers: down.
    Why: the activation takes each channel by itself.
``value.{i}``, the values of an attention
    Moves: the rows and biases of v; the columns of o, alike in all query heads that share
    a key/value head.
    Freedom: any order inside a head; the head's channels are a *segment*.
    Consumers: o.
    Why: attention weighs all channels of a head with one number.

The rows of q and k never move: rotary embeddings tie them in pairs. Neither do tokens,
labels and pixels, nor the outputs of a model without a head.

The words, one for each axis of a parameter, in the order of its shape:

===================  =================================================================
``_``, ``_output``   the axis never moves; a name may say why
``hidden.{i}``       the space that permutes the axis; any number of ``.parts`` may follow
                     the family
``value.{i}:heads``  the space of key/value heads, followed over their query heads
``a+b``              fused weights, one part after another, all of equal length, but for
                     those with ``:heads``
``a|b``              fused weights that take turns: each key/value head's share of every
                     part, then those of the next head; lengths as for ``a+b``
``_:heads``          a part that never moves, as long as the axis that follows the space
                     of the other parts with ``:heads``
``{e}``              as the first word: the axis numbers the matrices of a packed stack
===================  =================================================================

The lines, of parameters' names: ``{i}`` is any number, ``{a,b}`` is one of several names,
and a line that ends in ``?`` may fit no parameter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

FAMILIES = ("residual", "hidden", "value")
"""The kinds of spaces, as the module's table explains them. Every space's name begins with
one; the recipe's ``spaces`` chooses among them which spaces are reordered."""

_FIXED = re.compile(r"_[a-z]*")
_SPACE = re.compile(rf"({'|'.join(FAMILIES)})(\.[a-z0-9_]+)*")


@dataclass(frozen=True)
class Part:
    """
    A run of neighbouring channels along an axis, and the space that permutes it, if any.

    :param heads: the run follows the space's key/value heads over their query heads; a
        run that no space permutes is as long as such a run
    :param interleaved: the parts of the axis take turns, one key/value head after another
    :param length: the number of channels; 0 until it is measured
    :param reason: says why no space permutes the run, in a word of the spec's author
    """

    space: str | None
    heads: bool = False
    interleaved: bool = False
    length: int = 0
    reason: str = field(default="", compare=False)


Axis = tuple[Part, ...]
"""An axis has one part, or several where weights are fused."""


@dataclass(frozen=True)
class Line:
    """
    A line of a spec that fits a parameter.

    :param text: the line as it was written
    :param words: one for each axis of the parameter
    :param numbers: what ``{i}`` stands for in this parameter's name
    """

    text: str
    words: tuple[str, ...]
    numbers: Mapping[str, str]

    @property
    def counter(self) -> str | None:
        """The ``e`` of a first word ``{e}``, which says that the axis numbers matrices."""
        first = self.words[0] if self.words else ""
        return first[1:-1] if first[:1] == "{" and first[-1:] == "}" else None

    def axes(self, name: str, count: int | None = None) -> tuple[Axis, ...]:
        """
        Read the words as axes, those of matrix ``count`` where an axis numbers matrices.

        :param name: the parameter's name, for errors
        :raises ValueError: if a word is not of the grammar, or names a space twice
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
    """All lines of a spec; parameters' names find theirs, and unused lines are known."""

    def __init__(self, spec: Mapping[str, str]) -> None:
        self._patterns = {line: _pattern(line) for line in spec}
        self._spec = spec
        self._used: set[str] = set()

    def of(self, name: str) -> Line | None:
        """
        Find the line that fits a parameter's name, or None.

        :raises ValueError: if two lines fit
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
        See that every line without a ``?`` has fitted a parameter.

        :raises ValueError: if one has not; the error names the first
        """
        for line in self._spec:
            if line not in self._used and not line.endswith("?"):
                raise ValueError(
                    f"the spec's line {line!r} fits no parameter of the model; correct "
                    "the name, or end it in '?' if the parameter may be absent"
                )


def _axis(word: str, numbers: Mapping[str, str], name: str) -> Axis:
    texts = word.split("|" if "|" in word else "+")
    return tuple(_part(text, word, numbers, name) for text in texts)


def _part(text: str, word: str, numbers: Mapping[str, str], name: str) -> Part:
    space, colon, suffix = text.partition(":")
    for key, number in numbers.items():
        space = space.replace("{" + key + "}", number)
    heads = suffix == "heads"
    if heads or not colon:
        if _FIXED.fullmatch(space) and (not heads or text != word):
            return Part(None, heads, "|" in word, reason=space[1:])
        if _SPACE.fullmatch(space):
            return Part(space, heads, "|" in word)
    raise ValueError(
        f"parameter {name}: {word!r} is no word of a permutation spec; write '_', "
        "'residual', 'hidden.{i}', 'value.{i}' or 'value.{i}:heads', and 'a+b' for "
        "fused weights, or 'a|b' where they take turns by head"
    )


def _pattern(line: str) -> re.Pattern[str]:
    """Turn a spec's line into a regular expression; ``{i}`` becomes the group ``i``."""
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
