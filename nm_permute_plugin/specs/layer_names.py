# SPDX-License-Identifier: Apache-2.0
"""Texts that differ in one number, as those of layers do, in one text."""

import re
from collections.abc import Iterable
from itertools import groupby

_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")


def merged(texts: Iterable[str]) -> list[str]:
    """
    The texts; those together that differ only in the last number of their dotted names.

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
    """The text with ``{}`` for its number; as it is, and 0, where there is not one."""
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
    """As in ``0-3,5``."""
    runs = groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ",".join(
        str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans
    )
