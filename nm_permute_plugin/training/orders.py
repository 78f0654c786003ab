# SPDX-License-Identifier: Apache-2.0
"""The orders of all spaces as parameters: logits that say which channels go together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nm_permute_plugin.maths.assignment import assign, order_by
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import (
    Permutation,
    compose,
    from_blocks,
    invert,
)
from nm_permute_plugin.maths.sinkhorn import sinkhorn
from nm_permute_plugin.training.relaxation import (
    InsertionMask,
    Reorder,
    RowSample,
    permuted_mask,
)
from nm_permute_plugin.training.stacking import StackedScore

Relaxation = Literal["insertion", "straight_through", "soft"]


@dataclass(frozen=True)
class OrderShape:
    """
    How an order is parametrised.

    :param block_size: channels that may mix; a multiple of M
    :param groups: instead of ``block_size``: into how many blocks a space is cut
    :param relaxation: ``insertion``: hard groups, the gradient of every single move;
        ``straight_through``: hard places, the soft matching's gradient
        (https://arxiv.org/abs/2510.10136); ``soft``: soft places while training, hard at
        the end (https://arxiv.org/abs/2601.22980)
    :param start_logit: how firmly a channel starts in its place
    :param sinkhorn_iterations: row and column normalisations
    :param row_limit: rows of a space that weigh the moves of a step; None: all of them
    """

    block_size: int = 64
    groups: int | None = None
    relaxation: Relaxation = "insertion"
    start_logit: float = 0.3
    sinkhorn_iterations: int = 10
    row_limit: int | None = None

    def size_in(self, wall: int, m: int) -> int:
        """
        The block's size in a run of ``wall`` channels: the largest multiple of M that
        divides the run and is no larger than asked for.

        >>> OrderShape(block_size=64).size_in(576, 4), OrderShape(groups=4).size_in(60, 4)
        (64, 12)
        """
        wanted = self.block_size if self.groups is None else wall // self.groups
        sizes = range(m, min(max(wanted, m), wall) + 1, m)
        return max(size for size in sizes if wall % size == 0)

    def columns(self, size: int, m: int) -> int:
        """Columns of the logits of a block: its groups, or its places."""
        return size // m if self.relaxation == "insertion" else size


class LearnableOrders(nn.Module):
    """
    The orders of all spaces while they are learned.

    Blocks of one size share one tensor of logits, whatever space they belong to: one
    matching and one assignment a step serve them all.

    :param stacks: the scores of all readers, by space
    :param start: the orders to begin with, by space
    :param dtype: of the masks: that of the weights
    """

    def __init__(
        self,
        stacks: Mapping[str, StackedScore],
        start: Mapping[str, Permutation],
        pattern: NMPattern,
        shape: OrderShape,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.pattern, self.shape, self.dtype = pattern, shape, dtype
        self.blocks = {
            name: _Blocks.of(stack, start[name], pattern, shape)
            for name, stack in stacks.items()
        }
        self.logits = nn.ParameterDict()
        for size in sorted({blocks.size for blocks in self.blocks.values()}):
            sharing = [b for b in self.blocks.values() if b.size == size]
            columns = shape.columns(size, pattern.m)
            own = torch.arange(size, device=sharing[0].score.device) * columns // size
            firm = nn.functional.one_hot(own, columns).float() * shape.start_logit
            count = sum(blocks.count for blocks in sharing)
            self.logits[str(size)] = nn.Parameter(firm.repeat(count, 1, 1))

    def perms(self) -> dict[str, Permutation]:
        """The orders as they stand, hard, by space."""
        columns = self._by_space(
            {size: assign(logits) for size, logits in self.logits.items()}
        )
        return {
            name: compose(blocks.start, from_blocks(order_by(columns[name])))
            for name, blocks in self.blocks.items()
        }

    def masks(
        self, temperature: float, step: int
    ) -> dict[str, Float[Tensor, "out in"]]:
        """
        The masks of all readers, by linear, with gradients for the logits.

        :param step: chooses the rows that weigh the moves
        """
        iterations = self.shape.sinkhorn_iterations
        softs = {
            size: sinkhorn(logits, temperature, iterations)
            for size, logits in self.logits.items()
        }
        hards = {
            size: assign(logits)
            for size, logits in self.logits.items()
        }
        soft, hard = self._by_space(softs), self._by_space(hards)
        masks: dict[str, Tensor] = {}
        for name, blocks in self.blocks.items():
            mask = self._mask(blocks.score, soft[name], hard[name], step)
            whole = Reorder.apply(rearrange(mask, "r b s -> r (b s)"), blocks.back)
            masks |= blocks.stacked.split(whole)
        return masks

    def _mask(
        self,
        score: Float[Tensor, "rows blocks size"],
        soft: Float[Tensor, "blocks size columns"],
        hard: Int[Tensor, "blocks size"],
        step: int,
    ) -> Float[Tensor, "rows blocks size"]:
        if self.shape.relaxation == "insertion":
            sample = RowSample.of_step(len(score), self.shape.row_limit, step)
            mask: Tensor = InsertionMask.apply(
                score, soft, hard, self.pattern, sample, self.dtype
            )
            return mask
        if self.shape.relaxation == "straight_through":
            places = nn.functional.one_hot(hard, soft.shape[-1])
            soft = places + soft - soft.detach()
        return permuted_mask(score, soft, self.pattern).to(self.dtype)

    def _by_space(self, by_size: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut tensors that hold the blocks of all spaces of one size."""
        parts: dict[str, Tensor] = {}
        for size, tensor in by_size.items():
            names = [n for n, b in self.blocks.items() if str(b.size) == size]
            counts = [self.blocks[name].count for name in names]
            parts |= dict(zip(names, tensor.split(counts), strict=True))
        return parts


@dataclass(frozen=True)
class _Blocks:
    """One space, its scores in the order of the start, cut into blocks."""

    stacked: StackedScore
    start: Permutation
    back: Permutation
    score: Float[Tensor, "rows blocks size"]

    @classmethod
    def of(
        cls,
        stacked: StackedScore,
        start: Permutation,
        pattern: NMPattern,
        shape: OrderShape,
    ) -> "_Blocks":
        size = shape.size_in(stacked.space.wall, pattern.m)
        start = start.to(stacked.score.device)
        score = rearrange(stacked.score[:, start], "r (b s) -> r b s", s=size)
        return cls(stacked, start, invert(start), score)

    @property
    def size(self) -> int:
        return self.score.shape[2]

    @property
    def count(self) -> int:
        return self.score.shape[1]
