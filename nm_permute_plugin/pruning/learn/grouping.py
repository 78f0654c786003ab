# SPDX-License-Identifier: Apache-2.0
"""Which channels of a space form groups."""

from dataclasses import dataclass
from functools import cached_property

from einops import rearrange
from jaxtyping import Int, Shaped
from torch import Tensor

from nm_permute_plugin.maths.assignment import order_by
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import (
    Permutation,
    compose,
    from_blocks,
    invert,
)


@dataclass(frozen=True)
class Grouping:
    """
    Which channels of a space form groups.

    :param start: the channels of the space, block after block
    :param column: the group of each channel in its block
    """

    start: Permutation
    column: Int[Tensor, "blocks size"]
    pattern: NMPattern

    def blocks(
        self, matrix: Shaped[Tensor, "rows channels"]
    ) -> Shaped[Tensor, "rows blocks size"]:
        """The channels of a matrix, block by block."""
        count = len(self.column)
        return rearrange(matrix[:, self.start], "r (b s) -> r b s", b=count)

    @cached_property
    def back(self) -> Permutation:
        """Where each channel of the space stands in the blocks."""
        return invert(self.start)

    @cached_property
    def places(self) -> Permutation:
        """Where the channels stand in the blocks, group by group."""
        return from_blocks(order_by(self.column))

    @cached_property
    def channels(self) -> Permutation:
        """The channels, group by group."""
        return compose(self.start, self.places)
