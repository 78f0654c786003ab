# SPDX-License-Identifier: Apache-2.0
"""
Score multipliers: a learned mask, with a number for every input channel of a few rows.

The permutation stays as it is. What learns is what the scores of every input channel are
multiplied by, for each group of ``rows`` rows of a linear, so that the linears that share a
permutation choose for themselves which channels they keep. Only the mask sees multipliers:
the weights stay as they are, and nothing is left to do at run time.

Forward uses the hard mask. Backward has the gradient of a choice that is a little soft
(``maths.mask_gradients.score_gradient``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from nm_permute_plugin.maths.mask_gradients import score_gradient
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, invert
from nm_permute_plugin.maths.ranks import group_ranks
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.running.masked import Mask
from nm_permute_plugin.pruning.settings import LearnSettings
from nm_permute_plugin.specs.spec import Consumer


class ScoreMultipliers:
    """
    The learner of the stage ``multipliers``: see ``loop.Learner``.

    :param start: its permutations stay; multipliers begin at 1
    :param steps: after which the learning rate has fallen to 0
    """

    use_graph = True

    def __init__(
        self, problem: Problem, start: Solution, settings: LearnSettings, steps: int
    ) -> None:
        self._perms = dict(start.perms)
        self._fixed = problem.fixed_masks
        self._masks: list[MultipliedMask] = []
        most = settings.multipliers.rows
        for name, space in problem.spaces.items():
            perm = start.perms[name].to(space.score.device)
            for consumer, score in space.parts():
                groups = row_groups(len(score), consumer.queries, most)
                log = nn.Parameter(score.new_zeros(groups, score.shape[1]))
                self._masks.append(
                    MultipliedMask(consumer, score, perm, log, problem.pattern)
                )
        self._optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.multipliers.rate,
            weight_decay=0.0,
            fused=self._masks[0].log_multiplier.is_cuda,
        )
        self._schedule = torch.optim.lr_scheduler.LinearLR(
            self._optimizer, 1.0, 1 / steps, total_iters=steps
        )

    @property
    def rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def prepare(self, step: int) -> None:
        """Nothing is to be done before a step."""

    def masks(self) -> Mapping[str, Mask]:
        # Copies, because a mask caches what it made (`_kept`) from a step's multipliers.
        return {**self._fixed, **{m.consumer.name: replace(m) for m in self._masks}}

    @property
    def parameters(self) -> Sequence[Tensor]:
        return [mask.log_multiplier for mask in self._masks]

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        self._schedule.step()

    def solution(self) -> Solution:
        multipliers = {
            mask.consumer.name: mask.consumer.unview(mask.log_multiplier.detach().exp())
            for mask in self._masks
        }
        return Solution(self._perms, multipliers)

    def state_dict(self) -> dict[str, Any]:
        return {
            "log_multipliers": self.parameters,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for mask, log in zip(self._masks, state["log_multipliers"], strict=True):
            mask.log_multiplier.copy_(log)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


@dataclass(frozen=True)
class MultipliedMask:
    """
    The N:M mask of one linear's scores times their multipliers: a ``LearnedMask``.

    :param score: of the weights, as the consumer views them
    :param perm: the channels group by group
    :param log_multiplier: the logarithms of the multipliers, one row for each group of
        rows; a change of it changes all log-scores of the group alike
    """

    consumer: Consumer
    score: Float[Tensor, "rows channels"]
    perm: Permutation
    log_multiplier: Float[Tensor, "row_groups channels"]
    pattern: NMPattern

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.log_multiplier,)

    def kept(self) -> Bool[Tensor, "out in"]:
        if not self._in_triton:
            return self._kept
        # A second pass in backward takes less time than the mask would take memory.
        from nm_permute_plugin.maths.mask_gradients_triton import mask_in_triton

        factor = self.log_multiplier.detach().exp()
        kept = mask_in_triton(self.score, factor, self.perm, self.pattern)
        return self.consumer.unview(kept)

    @cached_property
    def _kept(self) -> Bool[Tensor, "out in"]:
        kept = group_ranks(self._grouped(self._scaled())) < self.pattern.n
        return self.consumer.unview(self._ungrouped(kept))

    def gradients(self, of_mask: Float[Tensor, "out in"]) -> tuple[Tensor, ...]:
        grad = self.consumer.view(of_mask)
        if self._in_triton:
            from nm_permute_plugin.maths.mask_gradients_triton import (
                score_gradient_in_triton,
            )

            factor = self.log_multiplier.detach().exp()
            return (
                score_gradient_in_triton(
                    self.score, factor, grad, self.perm, self.pattern
                ),
            )
        of_scores = score_gradient(
            self._grouped(self._scaled()), self._grouped(grad), self.pattern
        )
        row_groups = of_scores.unflatten(0, (len(self.log_multiplier), -1))
        return (self._ungrouped(row_groups.sum(1)),)

    @property
    def _in_triton(self) -> bool:
        return self.score.is_cuda and find_spec("triton") is not None

    def _scaled(self) -> Float[Tensor, "rows channels"]:
        factor = self.log_multiplier.detach().exp()
        rows = self.score.unflatten(0, (len(factor), -1))
        scaled: Tensor = rows * factor[:, None]
        return scaled.flatten(0, 1)

    def _grouped(
        self, matrix: Float[Tensor, "rows channels"]
    ) -> Float[Tensor, "rows groups m"]:
        # In memory the first of all groups lie side by side, then the second (`by_place`).
        m = self.pattern.m
        places = matrix.new_empty(m, len(matrix), matrix.shape[1] // m)
        for place in range(m):
            torch.index_select(matrix, 1, self.perm[place::m], out=places[place])
        return places.movedim(0, -1)

    def _ungrouped(
        self, groups: Shaped[Tensor, "rows groups m"]
    ) -> Shaped[Tensor, "rows channels"]:
        order = rearrange(self.perm, "(g m) -> (m g)", m=self.pattern.m)
        return rearrange(groups, "r g m -> r (m g)").index_select(1, invert(order))


def row_groups(rows: int, queries: int, most: int | None) -> int:
    """
    Into how many equal groups the rows of a linear are split.

    A group has at most ``most`` rows, and never spans two query heads.

    :param rows: as the consumer views its weight, all query heads one below the other
    :param most: None takes all rows of a query head

    >>> row_groups(rows=48, queries=1, most=16), row_groups(rows=48, queries=2, most=None)
    (3, 2)
    """
    of_query = rows // queries
    least = 1 if most is None else -(-of_query // most)
    return queries * next(n for n in range(least, of_query + 1) if of_query % n == 0)
