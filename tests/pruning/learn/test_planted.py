# SPDX-License-Identifier: Apache-2.0
"""Every learner of permutations finds its way back to channels that were scrambled."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from learning import as_it_is, text

from nm_permute_plugin.maths.permutation import from_blocks
from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.learn.loop import learn
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.settings import LearnStage, Settings

PERMUTATIONS = [stage for stage in get_args(LearnStage) if stage != "multipliers"]


@pytest.fixture
def planted(tiny_model, make_problem) -> Callable[[str], tuple[Problem, Solution]]:
    """
    A scrambled start, and a problem where the channels as they are are (nearly) perfect.

    In every row of the consumer, two of every four neighbours are all but zero.
    """

    def make(family: str) -> tuple[Problem, Solution]:
        model = tiny_model("llama", num_key_value_heads=4)
        generator = torch.Generator().manual_seed(3)
        part = "mlp.down_proj" if family == "hidden" else "self_attn.o_proj"
        for layer in range(2):
            weight = model.get_submodule(f"model.layers.{layer}.{part}").weight
            keys = torch.rand(*weight.shape, generator=generator)
            ranks = keys.unflatten(1, (-1, 4)).argsort(-1).argsort(-1).flatten(1)
            with torch.no_grad():
                weight.mul_(torch.where(ranks < 2, 1.5, 0.01))
        data = Data(text(16, seed=1), text(8, seed=2))
        problem = make_problem(model, data, [f"{family}.0", f"{family}.1"])
        perms = {
            name: from_blocks(
                torch.rand(
                    of.space.size // of.space.segment,
                    of.space.segment,
                    generator=generator,
                ).argsort()
            )
            for name, of in problem.spaces.items()
        }
        return problem, Solution(perms)

    return make


@pytest.mark.parametrize("family", ["hidden", "value"])
@pytest.mark.parametrize("stage", PERMUTATIONS)
def test_a_planted_permutation_is_approached(
    planted: Callable[[str], tuple[Problem, Solution]], family: str, stage: LearnStage
) -> None:
    problem, start = planted(family)
    group = {"block_size": 48} if stage == "swaps" else {"block_size": 48, "rate": 0.03}
    name = "swaps" if stage == "swaps" else "published"
    learn_settings = {"stages": [stage], "steps": 150, name: group}
    settings = Settings(learn=learn_settings, validation={"every": 15})
    best, before = problem.validate(as_it_is(problem)), problem.validate(start)
    found, _ = learn(problem, start, settings)
    assert best < 0.05 * before
    limit = 0.4 if stage == "swaps" else 0.75
    assert problem.validate(found) < limit * before
