# SPDX-License-Identifier: Apache-2.0
"""Tables of words, without what nobody filled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """
    A table.

    :param columns: the titles
    :param lines: as many words each as there are columns
    """

    columns: Sequence[str]
    lines: Sequence[Sequence[str]]

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[str]]) -> "Table":
        """The columns that are not empty, by their titles."""
        filled = {title: words for title, words in columns.items() if any(words)}
        return cls(list(filled), list(zip(*filled.values(), strict=True)))

    def turned(self) -> "Table":
        """Lines for columns: the first column becomes the titles."""
        titles = [line[0] for line in self.lines]
        lines = [
            [title, *(line[number] for line in self.lines)]
            for number, title in enumerate(self.columns)
        ]
        return Table([self.columns[0], *titles], lines[1:])


def words(value: T | None, say: Callable[[T], str]) -> str:
    """What is to be said of a value; nothing of None."""
    return "" if value is None else say(value)
