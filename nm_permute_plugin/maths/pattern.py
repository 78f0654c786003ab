# SPDX-License-Identifier: Apache-2.0
"""N:M sparsity patterns as values: how many weights are kept of how many neighbours."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class NMPattern:
    """
    N:M sparsity: of every ``m`` consecutive input channels, at most ``n`` are kept.

    ``n`` counts the weights that STAY. Some tools count the zeros instead; for 2:4
    and 4:8 the two readings agree.

    :param n: weights kept in a group, at least 1 and fewer than ``m``
    :param m: consecutive input channels of a group
    :raises ValueError: if not ``0 < n < m``

    >>> NMPattern(2, 4).density
    0.5
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(
                f"{self.n}:{self.m} is no sparsity pattern: N:M keeps "
                "N of every M weights, so 0 < N < M is needed. Use 2:4 or 4:8, say."
            )

    @classmethod
    def parse(cls, text: str) -> "NMPattern":
        """
        Read ``"N:M"`` as it stands in a recipe.

        :raises ValueError: if the text is not two whole numbers with ``0 < N < M``

        >>> NMPattern.parse("2:4")
        NMPattern(n=2, m=4)
        """
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found is None:
            raise ValueError(
                f"the pattern {text!r} is not of the form 'N:M', '2:4' for example"
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def density(self) -> float:
        """The share of weights that stay."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"
