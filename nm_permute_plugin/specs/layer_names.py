# SPDX-License-Identifier: Apache-2.0
"""Names that differ only in a layer's number are told once."""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import groupby

_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")
_NUMBER = re.compile(r"\.\d+(?=\.|$| )")


def counted(names: Iterable[str], number: str = "{i}") -> Counter[str]:
    """
    Count the names that are alike but for their numbers, in the order they come in.

    :param number: stands for each number

    >>> dict(counted(["a.0.w", "a.1.w", "b.w"]))
    {'a.{i}.w': 2, 'b.w': 1}
    """
    return Counter(_NUMBER.sub(f".{number}", name) for name in names)


def merged(texts: Iterable[str]) -> list[str]:
    """
    Tell texts in one that differ only in the last number of their dotted names.

    >>> merged(["a.0.w reads b.0", "a.1.w reads b.1", "a.3.w reads b.3", "c.5.w"])
    ['a.{0-1,3}.w reads b.{0-1,3}', 'c.5.w']
    """
    groups: dict[str, dict[str, int]] = {}
    for text in texts:
        alike, number = _numbered(text)
        groups.setdefault(alike, {})[text] = number
    return [
        next(iter(of))
        if len(of) == 1
        else alike.replace("{}", f"{{{_ranges(of.values())}}}")
        for alike, of in groups.items()
    ]


def _numbered(text: str) -> tuple[str, int]:
    """Put ``{}`` for the text's number; leave it, and return 0, if it has not just one."""
    found: set[int] = set()

    def without(name: re.Match[str]) -> str:
        parts = name[0].split(".")
        places = [place for place, part in enumerate(parts) if part.isdigit()]
        if places:
            found.add(int(parts[places[-1]]))
            parts[places[-1]] = "{}"
        return ".".join(parts)

    alike = _DOTTED.sub(without, text)
    return (alike, found.pop()) if len(found) == 1 else (text, 0)


def _ranges(numbers: Iterable[int]) -> str:
    """Write numbers as in ``0-3,5``."""
    runs = groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ",".join(
        str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans
    )
