# SPDX-License-Identifier: Apache-2.0
"""How an order is parametrised."""

from dataclasses import dataclass
from typing import Literal

Relaxation = Literal["insertion", "straight_through", "soft"]
Learns = Literal["order", "multipliers"]
"""What learns at a time."""


@dataclass(frozen=True)
class OrderShape:
    """
    How an order is parametrised.

    :param block_size: channels that may mix; a multiple of M
    :param groups: instead of ``block_size``: into how many blocks a space is cut
    :param relaxation: ``insertion``: hard groups, the cost of every single move;
        ``straight_through``: hard places, the soft matching's gradient
        (https://arxiv.org/abs/2510.10136); ``soft``: soft places while training, hard at
        the end (https://arxiv.org/abs/2601.22980)
    :param start_logit: how firmly a channel starts in its place; not of ``insertion``
    :param sinkhorn_iterations: row and column normalisations; not of ``insertion``
    :param row_limit: rows of a space that weigh the moves of a step; None: all of them
    :param multipliers: learn what every input channel's scores are multiplied by as well
    :param multiplier_rows: rows of a linear that share multipliers; None: all of them
    """

    block_size: int = 64
    groups: int | None = None
    relaxation: Relaxation = "insertion"
    start_logit: float = 0.3
    sinkhorn_iterations: int = 10
    row_limit: int | None = None
    multipliers: bool = False
    multiplier_rows: int | None = 16

    def size_in(self, segment: int, m: int) -> int:
        """
        The block's size in a run of ``segment`` channels: the largest multiple of M that
        divides the run and is no larger than asked for.

        >>> OrderShape(block_size=64).size_in(576, 4), OrderShape(groups=4).size_in(60, 4)
        (64, 12)
        """
        wanted = self.block_size if self.groups is None else segment // self.groups
        sizes = range(m, min(max(wanted, m), segment) + 1, m)
        return max(size for size in sizes if segment % size == 0)
