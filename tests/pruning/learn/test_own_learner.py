# SPDX-License-Identifier: Apache-2.0
"""A learner of one's own takes a stage by the methods of ``loop.Learner`` alone."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from learning import as_it_is, fast, on, text
from torch import Tensor

from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.learn.loop import LEARNERS, Learner, learn
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.running.masked import Mask
from nm_permute_plugin.pruning.settings import LearnSettings


@pytest.fixture
def problem(tiny_model, make_problem) -> Problem:
    """Every kind of space, with shared key/value heads."""
    data = Data(text(8, seed=1), text(4, seed=2))
    return make_problem(tiny_model("llama"), data, ["residual", "hidden.0", "value.0"])


class Signs:
    """A learner of one's own: multipliers that follow the signs of their gradients."""

    use_graph = False

    def __init__(
        self, problem: Problem, start: Solution, settings: LearnSettings, steps: int
    ) -> None:
        self.problem, self.start = problem, start
        self.rate = settings.multipliers.rate
        self.logs = {
            name: torch.zeros(
                1, problem.model.get_submodule(name).in_features, requires_grad=True
            )
            for name in problem.linears
        }
        self.prepared: list[int] = []

    def prepare(self, step: int) -> None:
        self.prepared.append(step)

    def masks(self) -> Mapping[str, Mask]:
        hard = self.problem.masks(self.solution())
        return {
            name: mask + (self.logs[name] - self.logs[name].detach())
            for name, mask in hard.items()
        }

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.logs.values())

    def update(self) -> None:
        with torch.no_grad():
            for log in self.logs.values():
                log -= self.rate * log.grad.sign()
                log.grad.zero_()

    def solution(self) -> Solution:
        logs = self.logs.items()
        return Solution(self.start.perms, {n: log.detach().exp() for n, log in logs})

    def state_dict(self) -> dict[str, Any]:
        return self.logs

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.logs = {name: log.requires_grad_() for name, log in state.items()}


def test_a_learner_of_ones_own_learns(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(Signs(problem, Solution(), LearnSettings(), 1), Learner)
    monkeypatch.setitem(LEARNERS, "multipliers", Signs)
    seen: list[Learner] = []
    problem = on(problem, train=text(32, seed=1))
    start = as_it_is(problem)
    settings = fast("multipliers", steps=20)
    found, history = learn(
        problem, start, settings, lambda step, learner: seen.append(learner)
    )
    assert {type(learner) for learner in seen} == {Signs}
    assert seen[0].prepared == list(range(1, 21))
    assert problem.validate(found) < history[0]["validation"]
