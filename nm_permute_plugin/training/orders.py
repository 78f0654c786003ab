# SPDX-License-Identifier: Apache-2.0
"""The orders of all spaces as parameters: logits that say which channels go together."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
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
    :param multipliers: learn what every input channel's scores are multiplied by as well
    """

    block_size: int = 64
    groups: int | None = None
    relaxation: Relaxation = "insertion"
    start_logit: float = 0.3
    sinkhorn_iterations: int = 10
    row_limit: int | None = None
    multipliers: bool = False

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


class LearnableOrders:
    """
    The orders of all spaces while they are learned.

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
        alike: dict[tuple[tuple[int, ...], int], list[StackedScore]] = defaultdict(list)
        for stack in stacks.values():
            size = shape.size_in(stack.space.wall, pattern.m)
            alike[stack.sections, size].append(stack)
        self.bundles = [
            _Bundle(same, start, size, pattern, shape, dtype)
            for (_, size), same in alike.items()
        ]

    def parameters(self) -> list[nn.Parameter]:
        """The logits, [blocks, size, columns], one tensor for all spaces of a shape."""
        return [bundle.logits for bundle in self.bundles]

    def log_multipliers(self) -> list[nn.Parameter]:
        """What is learned of the scores, [sections, blocks, size]."""
        return [bundle.log_multiplier for bundle in self.bundles]

    def multipliers(self) -> dict[str, Float[Tensor, " in"]]:
        """What the scores of every input channel are multiplied by, by linear."""
        found: dict[str, Float[Tensor, " in"]] = {}
        for bundle in self.bundles:
            found |= bundle.multipliers()
        return found

    def perms(self) -> dict[str, Permutation]:
        """The orders as they stand, hard, by space."""
        found: dict[str, Permutation] = {}
        for bundle in self.bundles:
            found |= bundle.perms()
        return found

    def masks(
        self, temperature: float, step: int
    ) -> dict[str, Float[Tensor, "out in"]]:
        """
        The masks of all readers, by linear, with gradients for the logits.

        :param step: chooses the rows that weigh the moves
        """
        masks: dict[str, Float[Tensor, "out in"]] = {}
        for bundle in self.bundles:
            masks |= bundle.masks(temperature, step)
        return masks


class _Bundle(nn.Module):
    """
    Spaces with equally many rows and blocks of one size, side by side in one tensor.

    All layers of a model have the same shape: one matching, one assignment and one mask
    serve them together.
    """

    start: Permutation
    back: Permutation
    score: Float[Tensor, "rows blocks size"]

    def __init__(
        self,
        stacks: list[StackedScore],
        start: Mapping[str, Permutation],
        size: int,
        pattern: NMPattern,
        shape: OrderShape,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.stacks, self.pattern, self.shape, self.dtype = (
            stacks,
            pattern,
            shape,
            dtype,
        )
        self.widths = [stack.space.size for stack in stacks]
        score = torch.cat([stack.score for stack in stacks], dim=1)
        offsets = [sum(self.widths[:i]) for i in range(len(stacks))]
        starts = [
            start[stack.space.name].to(score.device) + offset
            for stack, offset in zip(stacks, offsets, strict=True)
        ]
        whole = torch.cat(starts)
        self.register_buffer("start", whole)
        self.register_buffer("back", invert(whole))
        blocks = rearrange(score[:, whole], "r (b s) -> r b s", s=size)
        self.register_buffer("score", blocks)
        columns = shape.columns(size, pattern.m)
        own = torch.arange(size, device=score.device) * columns // size
        firm = nn.functional.one_hot(own, columns).float() * shape.start_logit
        self.logits = nn.Parameter(firm.repeat(blocks.shape[1], 1, 1))
        self.sections = stacks[0].sections
        self.log_multiplier = nn.Parameter(
            score.new_zeros(len(self.sections), *blocks.shape[1:]),
            requires_grad=shape.multipliers,
        )

    def perms(self) -> dict[str, Permutation]:
        whole = compose(self.start, from_blocks(order_by(assign(self.logits))))
        parts, offset = {}, 0
        for stack, width in zip(self.stacks, self.widths, strict=True):
            parts[stack.space.name] = whole[offset : offset + width] - offset
            offset += width
        return parts

    def multipliers(self) -> dict[str, Float[Tensor, " in"]]:
        whole = rearrange(self.log_multiplier.detach().exp(), "r b s -> r (b s)")
        parts = whole[:, self.back].split(self.widths, dim=1)
        found: dict[str, Float[Tensor, " in"]] = {}
        for stack, part in zip(self.stacks, parts, strict=True):
            found |= stack.inputs(part)
        return found

    def masks(
        self, temperature: float, step: int
    ) -> dict[str, Float[Tensor, "out in"]]:
        soft = sinkhorn(self.logits, temperature, self.shape.sinkhorn_iterations)
        mask = rearrange(self._mask(soft, step), "r b s -> r (b s)")
        parts = Reorder.apply(mask, self.back).split(self.widths, dim=1)
        masks: dict[str, Float[Tensor, "out in"]] = {}
        for stack, part in zip(self.stacks, parts, strict=True):
            masks |= stack.split(part)
        return masks

    def _mask(
        self, soft: Float[Tensor, "blocks size columns"], step: int
    ) -> Float[Tensor, "rows blocks size"]:
        hard = assign(self.logits)
        if self.shape.relaxation == "insertion":
            sample = RowSample.of_step(len(self.score), self.shape.row_limit, step)
            mask: Tensor = InsertionMask.apply(
                self.score,
                self.log_multiplier,
                self.sections,
                soft,
                hard,
                self.pattern,
                sample,
                self.dtype,
            )
            return mask
        if self.shape.relaxation == "straight_through":
            places = nn.functional.one_hot(hard, soft.shape[-1])
            soft = places + soft - soft.detach()
        return permuted_mask(self.score, soft, self.pattern).to(self.dtype)
