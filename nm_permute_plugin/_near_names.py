# SPDX-License-Identifier: Apache-2.0
"""Guess which name a misspelt one stands for."""

from collections.abc import Iterable
from difflib import get_close_matches


def near_names(word: str, names: Iterable[str], most: int) -> list[str]:
    """Return the names that a word resembles, the nearest first."""
    return get_close_matches(word, list(dict.fromkeys(names)), n=most, cutoff=0.7)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """
    Return a question that ends an error message, or nothing where no name is near.

    >>> did_you_mean("learnt", ["learned", "search", "identity"])
    '; did you mean learned?'
    >>> did_you_mean("magic", ["learned", "search", "identity"])
    ''
    """
    near = near_names(word, names, 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
