# SPDX-License-Identifier: Apache-2.0
"""A problem as the package prepares it, and where learning starts: what is diagnosed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from methods import prunable
from nm_permute_plugin.pruning.data import Batch, Data
from nm_permute_plugin.pruning.learn.loop import LEARNERS, Learner
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.search import search_problem
from nm_permute_plugin.pruning.settings import LearnStage, Settings
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import resolve


@dataclass(frozen=True)
class Started:
    """
    A problem that is ready to be learned.

    :param settings: with which it was prepared
    :param start: what the search found
    """

    problem: Problem
    settings: Settings
    start: Solution

    def learner(self, stage: LearnStage) -> Learner:
        """The learner of a stage, at the start and before its first step."""
        steps = dict(self.settings.learn.schedule()).get(stage, 1)
        return LEARNERS[stage](self.problem, self.start, self.settings.learn, steps)

    def loss(self, solution: Solution, batches: Sequence[Batch]) -> float:
        """The loss on any batches under a solution."""
        masks = self.problem.masks(solution)
        return self.problem.teacher.validate(masks, batches)


def load(
    folder: Path, data: Data, settings: Settings, device: str, dtype: torch.dtype
) -> Started:
    """Measure a model and search its start, both as ``permute_and_prune`` does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(device).eval()
    linears = prunable(model)
    resolved = resolve(
        model, spec_of(model), settings.pattern, linears, head_dim_of(model.config)
    )
    problem = Problem.prepare(model, resolved, linears, data, settings)
    start, _ = search_problem(problem, settings)
    return Started(problem, settings, start)
