# SPDX-License-Identifier: Apache-2.0
"""
Score multipliers of a model in shards: weights, multipliers and their optimizer's state.

Scores are made from the gathered weights whenever a mask is needed, so that no rank holds
scores, nor masks, of more than the layer that runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.maths.scores import ScoreName, score_weight
from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.learn.multipliers import MultipliedMask, row_groups
from nm_permute_plugin.pruning.problem import (
    Problem,
    Solution,
    SpaceScores,
    measured_norms,
    measured_sensitivity,
)
from nm_permute_plugin.pruning.running.masked import LearnedMask, Mask, linear
from nm_permute_plugin.pruning.running.sharded import (
    gathered_rows,
    holding,
    learned_of,
    own_shard,
    sharded_twin,
)
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.session import known_run
from nm_permute_plugin.pruning.settings import LearnSettings, Settings
from nm_permute_plugin.specs.conv1d import weight_of
from nm_permute_plugin.specs.spec import Consumer, ResolvedSpec


@dataclass(frozen=True)
class WeightScore:
    """
    How the score of a weight is made from it.

    :param norms: of the inputs; None where the score does not read them
    """

    kind: ScoreName
    norms: Float[Tensor, " in"] | None

    def __call__(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return score_weight(self.kind, weight, self.norms)


@dataclass(frozen=True)
class MaskOfWeight:
    """
    A mask that is made from the weight that it masks, each time it is needed.

    :param twin: the model whose linear it is
    :param consumer: None for a linear whose inputs keep their places
    """

    twin: nn.Module
    name: str
    score: WeightScore
    pattern: NMPattern
    consumer: Consumer | None = None
    perm: Permutation | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return () if self.consumer is None else (learned_of(self.twin, self.name),)

    def bound(self, weight: Float[Tensor, "out in"]) -> "LearnedMask":
        """The mask of a weight, which lives no longer than it is used."""
        score = self.score(weight)
        if self.consumer is None or self.perm is None:
            return _Plain(nm_mask(score, self.pattern))
        (log,) = self.parameters
        view = self.consumer.view(score)
        return MultipliedMask(self.consumer, view, self.perm, log, self.pattern)


@dataclass(frozen=True)
class _Plain:
    """A mask that does not learn."""

    mask: Bool[Tensor, "out in"]
    parameters: tuple[Tensor, ...] = ()

    def kept(self) -> Bool[Tensor, "out in"]:
        return self.mask

    def gradients(self, of_mask: Float[Tensor, "out in"]) -> tuple[Tensor, ...]:
        return ()


@dataclass(frozen=True, kw_only=True)
class ShardedProblem(Problem):
    """
    A problem whose model lies in shards; its scores have shapes alone.

    The multipliers of its solutions are shards as well, until ``agreed`` gathers them.

    :param scores: how the score of every pruned linear is made
    """

    scores: Mapping[str, WeightScore]

    @classmethod
    def of_shards(
        cls,
        model: nn.Module,
        resolved: ResolvedSpec,
        prunable: Sequence[str],
        data: Data,
        settings: Settings,
    ) -> "ShardedProblem":
        """
        Measure a dense model in shards.

        :param model: whole, on the CPU
        """
        like = likes(shapes_of(model, resolved, settings), settings.learn)
        twin = sharded_twin(
            model, prunable, like, lambda name: torch.zeros(like[name].shape)
        )
        known = known_run(model, prunable, data, settings)
        norms = measured_norms(twin, prunable, data, settings, known)
        scores = {n: WeightScore(settings.score, norms.get(n)) for n in prunable}
        sensitivity = measured_sensitivity(twin, prunable, data, settings, known)

        shapes = shapes_of(model, resolved, settings, sensitivity)
        inside = {c.name for of in shapes.values() for c in of.space.consumers}
        fixed = {
            name: weight_of(linear(model, name)).to("meta")
            for name in prunable
            if name not in inside
        }
        return cls(
            *(twin, shapes, fixed, data, settings.pattern),
            Teacher(twin, settings.loss, keep=False),
            known,
            scores=scores,
        )

    def with_scores(self, model: nn.Module) -> Problem:
        """The problem of the model itself, with all scores on the CPU."""

        def score(name: str) -> Tensor:
            weight = weight_of(linear(model, name)).to(ranks.device())
            return self.scores[name](weight).cpu()

        spaces = {}
        for name, of in self.spaces.items():
            made = {c.name: score(c.name) for c in of.space.consumers}
            stacked = SpaceScores.of(of.space, made)
            spaces[name] = replace(stacked, sensitivity=of.sensitivity)
        fixed = {name: score(name) for name in self.fixed}
        teacher = Teacher(model, self.teacher.loss, keep=False)
        return Problem(
            *(model, spaces, fixed, self.data, self.pattern, teacher, self.known)
        )

    @cached_property
    def _learned(self) -> dict[str, nn.Parameter]:
        return {
            c.name: learned_of(self.model, c.name)
            for of in self.spaces.values()
            for c in of.space.consumers
        }

    def masks(self, solution: Solution) -> dict[str, Mask]:  # type: ignore[override]
        solution = self.complete(solution)
        masks: dict[str, Mask] = {
            name: MaskOfWeight(self.model, name, self.scores[name], self.pattern)
            for name in self.fixed
        }
        for name, of in self.spaces.items():
            perm = solution.perms[name].to(self.device)
            for c in of.space.consumers:
                score = self.scores[c.name]
                masks[c.name] = MaskOfWeight(
                    self.model, c.name, score, self.pattern, c, perm
                )
        return masks

    def validate(self, solution: Solution) -> float:
        ones = {
            name: torch.ones_like(own_shard(parameter))
            for name, parameter in self._learned.items()
        }
        values = {n: m.log() for n, m in (ones | solution.multipliers).items()}
        with torch.no_grad(), holding(self._learned, values):
            masks = self.masks(solution)
            return self.teacher.validate(masks, self.data.validation)

    def agreed(self, solution: Solution) -> Solution:
        """The solution with whole multipliers, on the CPU of every rank."""
        rows = {name: parameter.shape[0] for name, parameter in self._learned.items()}
        multipliers = {
            name: gathered_rows(shard, rows[name])
            for name, shard in solution.multipliers.items()
        }
        consumers = {
            c.name: c for of in self.spaces.values() for c in of.space.consumers
        }
        viewed = {n: consumers[n].unview(m) for n, m in multipliers.items()}
        return Solution(solution.perms, viewed)


def refuse_alone() -> None:
    """
    Refuse shards of one rank.

    :raises ValueError: if there are no others
    """
    if ranks.count() == 1:
        raise ValueError(
            "memory.shard puts a part of every weight on each of several GPUs, but there "
            "is one process: start the run by `torchrun --nproc-per-node GPUS -m "
            "nm_permute_plugin prune ...`, or leave it out"
        )


def shapes_of(
    model: nn.Module,
    resolved: ResolvedSpec,
    settings: Settings,
    sensitivity: Mapping[str, Tensor] | None = None,
) -> dict[str, SpaceScores]:
    """The spaces that may be permuted, with scores that have no memory."""
    return {
        name: SpaceScores.of(
            space,
            {
                c.name: weight_of(linear(model, c.name)).to("meta", torch.float32)
                for c in space.consumers
            },
            sensitivity,
        )
        for name, space in resolved.spaces.items()
        if space.consumers and space.family in settings.spaces
    }


def likes(
    spaces: Mapping[str, SpaceScores], settings: LearnSettings
) -> dict[str, Tensor]:
    """What the logarithms of the multipliers are like, by linear; without memory."""
    return {
        consumer.name: torch.empty(
            row_groups(len(score), consumer.queries, settings.multipliers.rows),
            score.shape[1],
            device="meta",
        )
        for of in spaces.values()
        for consumer, score in of.parts()
    }


class ShardedMultipliers:
    """The learner of the stage ``multipliers`` in shards: see ``loop.Learner``."""

    use_graph = False

    def __init__(
        self,
        problem: ShardedProblem,
        start: Solution,
        settings: LearnSettings,
        steps: int,
    ) -> None:
        self._problem, self._start = problem, start
        self._own = dict(problem._learned)
        self._optimizer = torch.optim.AdamW(
            self._own.values(), lr=settings.multipliers.rate, weight_decay=0.0
        )
        self._schedule = torch.optim.lr_scheduler.LinearLR(
            self._optimizer, 1.0, 1 / steps, total_iters=steps
        )

    @classmethod
    def of(cls, problem: Problem, *given: Any) -> "ShardedMultipliers":
        """The learner of a problem in shards."""
        if not isinstance(problem, ShardedProblem):
            raise TypeError(f"a {type(problem).__name__} has no shards")
        return cls(problem, *given)

    @property
    def rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def prepare(self, step: int) -> None:
        """Nothing is to be done before a step."""

    def masks(self) -> Mapping[str, Mask]:
        return self._problem.masks(self._start)

    @property
    def parameters(self) -> Sequence[Tensor]:
        """None: FSDP sums their gradients."""
        return ()

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()

    def solution(self) -> Solution:
        shards = {name: own_shard(p).exp() for name, p in self._own.items()}
        return Solution(self._start.perms, shards)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError("the state of a sharded learner is not kept")
