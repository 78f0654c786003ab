# SPDX-License-Identifier: Apache-2.0
"""
The published learned permutations: logits, a Sinkhorn matching with annealing, AdamW.

``SoftPlaces`` trains with the soft matching and hardens it at the end
(https://arxiv.org/abs/2601.22980, eqs. 3 to 6); ``StraightThrough`` is hard forward and has
the soft matching's gradient (https://arxiv.org/abs/2510.10136, eqs. 4 to 8). Both are
restricted here to permutations that fold.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nm_permute_plugin.maths.assignment import assign_later
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, invert
from nm_permute_plugin.maths.ranks import group_ranks
from nm_permute_plugin.maths.sinkhorn import annealed, sinkhorn
from nm_permute_plugin.pruning.learn.same_shape import (
    SameShape,
    fixed_masks,
    same_shapes,
)
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.running.masked import Mask
from nm_permute_plugin.pruning.settings import LearnSettings

Places = Float[Tensor, "blocks size places"]
"""The share of each channel in each place of its block."""


class SoftPlaces:
    """
    The learner of the stage ``soft``: see ``loop.Learner``.

    :param fixed: spaces that keep the permutation of the start
    """

    use_graph = True

    def __init__(
        self,
        problem: Problem,
        start: Solution,
        settings: LearnSettings,
        steps: int,
        fixed: Collection[str] = (),
    ) -> None:
        self._settings, self._steps, self._done = settings.published, steps, 0
        self._start, self._pattern = start, problem.pattern
        self._dtype, self._fixed = problem.dtype, fixed_masks(problem, start, fixed)
        self._matchings = [
            _Matching(shape, self._settings.start_logit)
            for shape in same_shapes(problem, start, self._settings, fixed)
        ]
        self._temperature = torch.ones((), device=problem.device)
        self._optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self._settings.rate,
            weight_decay=self._settings.weight_decay,
        )
        self._schedule = torch.optim.lr_scheduler.LinearLR(
            self._optimizer, 1.0, 1 / steps, total_iters=steps
        )
        self.prepare(0)

    @property
    def rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def prepare(self, step: int) -> None:
        self._temperature.fill_(
            annealed(self._done, self._steps, *self._settings.temperature)
        )
        for matching in self._matchings:
            matching.place.copy_(matching.hard())

    def masks(self) -> Mapping[str, Mask]:
        masks: dict[str, Mask] = dict(self._fixed)
        for matching in self._matchings:
            shape = matching.shape
            pieces = self._relaxed(matching).split(shape.counts)
            parts = zip(shape.spaces, shape.starts, pieces, strict=True)
            for of, start, piece in parts:
                blocks = of.score[:, start].unflatten(-1, piece.shape[:2])
                mask = permuted_mask(blocks, piece, self._pattern).to(self._dtype)
                mask = _Reorder.apply(mask.flatten(1), invert(start))
                rows = mask.split(list(of.rows))
                masks |= {
                    consumer.name: consumer.unview(part)
                    for consumer, part in zip(of.space.consumers, rows, strict=True)
                }
        return masks

    @property
    def parameters(self) -> Sequence[Tensor]:
        return [matching.logits for matching in self._matchings]

    def update(self) -> None:
        self._done += 1
        self._optimizer.step()
        for matching in self._matchings:
            matching.harden()
        self._optimizer.zero_grad(set_to_none=False)
        self._schedule.step()

    def solution(self) -> Solution:
        perms = dict(self._start.perms)
        for matching in self._matchings:
            perms |= matching.shape.perms(matching.hard())
        return Solution(perms)

    def state_dict(self) -> dict[str, Any]:
        return {
            "done": self._done,
            "logits": [matching.logits for matching in self._matchings],
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._done = state["done"]
        for matching, logits in zip(self._matchings, state["logits"], strict=True):
            matching.logits.copy_(logits)
            matching.harden()
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    def _relaxed(self, matching: "_Matching") -> Places:
        """The places of channels as the masks of a step have them."""
        scaled = matching.logits / self._temperature
        return sinkhorn(scaled, iterations=self._settings.sinkhorn_iterations)


class StraightThrough(SoftPlaces):
    """
    The learner of the stage ``straight_through``: hard places, the soft ones' gradient.
    """

    def _relaxed(self, matching: "_Matching") -> Places:
        soft = super()._relaxed(matching)
        hard = nn.functional.one_hot(matching.place, soft.shape[-1])
        return hard + soft - soft.detach()


class _Matching:
    """
    The matching of channels and places in spaces of one shape.

    :ivar logits: what is learned, [blocks, size, size]
    :ivar place: the hard place of each channel, as the masks of a step have it
    """

    def __init__(self, shape: SameShape, start_logit: float) -> None:
        self.shape = shape
        places = torch.arange(shape.size, device=shape.device)
        self.place = places.repeat(sum(shape.counts), 1)
        one_hot = nn.functional.one_hot(self.place, shape.size).float()
        self.logits = nn.Parameter(one_hot * start_logit)
        self.harden()

    def harden(self) -> None:
        """Begin to assign channels to places, while the device does something else."""
        self.hard: Callable[[], Int[Tensor, "blocks size"]]
        self.hard = cache(assign_later(self.logits))


def permuted_mask(
    score: Float[Tensor, "rows blocks size"], places: Places, pattern: NMPattern
) -> Float[Tensor, "rows blocks size"]:
    """
    The N:M mask of permuted scores, brought back to the channels as they stand.

    ``mask = top_N(S P) P^T``; the top-N is exact forward, and has the gradient of
    N times the softmax inside each group backward (PermLLM,
    https://arxiv.org/abs/2510.10136, eq. 8). Scores are taken relative to their group.

    :param places: soft, or hard with a straight-through gradient
    """
    permuted = torch.einsum("rbi,bij->rbj", score, places)
    groups = rearrange(permuted, "r b (g m) -> r b g m", m=pattern.m)
    scale = groups.detach().mean(-1, keepdim=True).clamp_min(1e-12)
    soft = pattern.n * torch.softmax(groups / scale, dim=-1)
    hard = (group_ranks(groups.detach()) < pattern.n).to(soft.dtype)
    mask = rearrange(hard + soft - soft.detach(), "r b g m -> r b (g m)")
    return torch.einsum("rbj,bij->rbi", mask, places)


class _Reorder(torch.autograd.Function):
    """``matrix[:, perm]``, whose gradient is a plain reordering too."""

    @staticmethod
    def forward(
        ctx: Any, matrix: Float[Tensor, "rows channels"], perm: Permutation
    ) -> Float[Tensor, "rows channels"]:
        ctx.save_for_backward(perm)
        return matrix[:, perm]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (perm,) = ctx.saved_tensors
        return grads[0][:, invert(perm)], None
