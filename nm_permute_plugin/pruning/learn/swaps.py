# SPDX-License-Identifier: Apache-2.0
"""
Channel swaps: a learned permutation, without a relaxation.

Channels are in hard groups of M. Backward says, for every channel and every group of its
block, the first-order change of the loss if the channel joined that group
(``maths.mask_gradients.move_costs``), and in each block the two channels that promise most
change places.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from nm_permute_plugin.maths.assignment import order_by
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, from_blocks, invert
from nm_permute_plugin.maths.swaps import grouped_mask, move_costs, swap
from nm_permute_plugin.pruning.learn.same_shape import (
    SameShape,
    fixed_masks,
    same_shapes,
)
from nm_permute_plugin.pruning.problem import Problem, Solution, SpaceScores
from nm_permute_plugin.pruning.running.masked import Mask
from nm_permute_plugin.pruning.settings import LearnSettings
from nm_permute_plugin.specs.spec import Consumer

MOMENTUM = 0.8
"""Share of the running average of move costs that a step keeps."""


class ChannelSwaps:
    """
    The learner of the stage ``swaps``: see ``loop.Learner``.

    :param fixed: spaces that keep the permutation of the start
    """

    def __init__(
        self,
        problem: Problem,
        start: Solution,
        settings: LearnSettings,
        steps: int,
        fixed: Collection[str] = (),
    ) -> None:
        self._settings, self._steps, self._done = settings.swaps, steps, 0
        self._start, self._pattern = start, problem.pattern
        self._fixed = fixed_masks(problem, start, fixed)
        self._groups = [
            _Groups(shape, self._pattern.m)
            for shape in same_shapes(problem, start, self._settings, fixed)
        ]
        self.prepare(0)

    @property
    def use_graph(self) -> bool:
        """Whether steps are alike: not where each weighs other rows."""
        return all(self._stride(groups) == 1 for groups in self._groups)

    @property
    def rate(self) -> float:
        """The share of the swaps of a step, which falls to 0."""
        return self._settings.share * (1 - self._done / self._steps)

    def prepare(self, step: int) -> None:
        self._offsets = [step % self._stride(groups) for groups in self._groups]

    def masks(self) -> Mapping[str, Mask]:
        masks: dict[str, Mask] = dict(self._fixed)
        for groups, offset in zip(self._groups, self._offsets, strict=True):
            stride = self._stride(groups)
            for space, start, group_of, cost in groups.by_space():
                first = 0
                for consumer, score in space.parts():
                    # The sample runs through the rows of all consumers.
                    rows = slice((offset - first) % stride, None, stride)
                    first += len(score)
                    masks[consumer.name] = GroupedMask(
                        consumer, score, start, group_of, cost, rows, self._pattern
                    )
        return masks

    @property
    def parameters(self) -> Sequence[Tensor]:
        return [groups.cost for groups in self._groups]

    def update(self) -> None:
        share = self.rate
        self._done += 1
        for groups in self._groups:
            groups.swap(share)

    def solution(self) -> Solution:
        perms = dict(self._start.perms)
        for groups in self._groups:
            perms |= groups.shape.perms(groups.group_of)
        return Solution(perms)

    def state_dict(self) -> dict[str, Any]:
        groups = [(of.group_of, of.average) for of in self._groups]
        return {"done": self._done, "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._done = state["done"]
        for of, (group_of, average) in zip(self._groups, state["groups"], strict=True):
            of.group_of.copy_(group_of)
            of.average.copy_(average)

    def _stride(self, groups: "_Groups") -> int:
        """One row of so many weighs the moves of a step."""
        limit = self._settings.row_limit
        rows = sum(groups.shape.spaces[0].rows)
        return 1 if limit is None else -(-rows // limit)


class _Groups:
    """
    The groups of M channels in spaces of one shape.

    :ivar group_of: the group of each channel in its block
    :ivar cost: always 0; its gradient is the cost of every move
    :ivar average: the running average of the costs
    """

    def __init__(self, shape: SameShape, m: int) -> None:
        self.shape = shape
        size, blocks = shape.size, sum(shape.counts)
        self.group_of = torch.arange(size, device=shape.device) // m
        self.group_of = self.group_of.repeat(blocks, 1)
        zeros = torch.zeros(blocks, size, size // m, device=shape.device)
        self.cost, self.average = nn.Parameter(zeros), zeros.clone()

    def by_space(self) -> Iterator[tuple[SpaceScores, Permutation, Tensor, Tensor]]:
        """Every space with its start, and its part of ``group_of`` and of ``cost``."""
        counts = self.shape.counts
        parts = self.group_of.split(counts), self.cost.split(counts)
        return zip(self.shape.spaces, self.shape.starts, *parts, strict=True)

    def swap(self, share: float) -> None:
        """Swap channels in at most this share of the blocks, and zero the gradient."""
        gradient = self.cost.grad
        if gradient is None:
            return
        self.average.lerp_(gradient, 1 - MOMENTUM)
        gradient.zero_()
        swap(self.average, self.group_of, round(share * len(self.group_of)))


@dataclass(frozen=True)
class GroupedMask:
    """
    The N:M mask of one linear whose channels are in groups: a ``LearnedMask``.

    :param score: of the weights, as the consumer views them
    :param start: the channels block by block
    :param group_of: the group of each channel in its block
    :param cost: gets the cost of every move as its gradient
    :param rows: those that weigh the moves; all rows make the mask
    """

    consumer: Consumer
    score: Float[Tensor, "rows channels"]
    start: Permutation
    group_of: Int[Tensor, "blocks size"]
    cost: Float[Tensor, "blocks size groups"]
    rows: slice
    pattern: NMPattern

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.cost,)

    def kept(self) -> Bool[Tensor, "out in"]:
        if not self._in_triton:
            return self._kept
        from nm_permute_plugin.maths.mask_gradients_triton import mask_in_triton

        ones = torch.ones_like(self.score[:1])
        perm = self.start[self._places]
        kept = mask_in_triton(self.score, ones, perm, self.pattern)
        return self.consumer.unview(kept)

    @cached_property
    def _kept(self) -> Bool[Tensor, "out in"]:
        blocks = grouped_mask(self._blocks(self.score), self.group_of, self.pattern)
        return self.consumer.unview(blocks.flatten(1)[:, invert(self.start)])

    def gradients(self, of_mask: Float[Tensor, "out in"]) -> tuple[Tensor, ...]:
        grad = self.consumer.view(of_mask)
        if self._in_triton:
            from nm_permute_plugin.maths.mask_gradients_triton import (
                move_costs_in_triton,
            )

            return (
                move_costs_in_triton(
                    self.score,
                    grad,
                    self.start,
                    self._places,
                    self.group_of,
                    self.pattern,
                    self.rows,
                ),
            )
        score, grad = self._blocks(self.score[self.rows]), self._blocks(grad[self.rows])
        return (move_costs(score, grad, self.group_of, self.pattern),)

    @property
    def _in_triton(self) -> bool:
        return self.score.is_cuda and find_spec("triton") is not None

    @cached_property
    def _places(self) -> Permutation:
        """Where the channels stand in the blocks, group by group."""
        return from_blocks(order_by(self.group_of))

    def _blocks(
        self, matrix: Shaped[Tensor, "rows channels"]
    ) -> Shaped[Tensor, "rows blocks size"]:
        count = len(self.group_of)
        return rearrange(matrix[:, self.start], "r (b s) -> r b s", b=count)
