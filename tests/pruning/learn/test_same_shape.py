# SPDX-License-Identifier: Apache-2.0
"""Learned permutations: where they start, where channels may go, how blocks are cut."""

import pytest
import torch
from helpers import same_groups
from learning import learn_anything, leaves
from torch import Tensor

from nm_permute_plugin.maths.permutation import check_permutation
from nm_permute_plugin.pruning.learn.loop import LEARNERS, Learner
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.running.masked import LearnedMask, Mask, masked
from nm_permute_plugin.pruning.settings import LearnSettings, SwapSettings

STAGES = ["swaps", "soft", "straight_through"]
HARD = ["swaps", "straight_through"]


def learner_of(stage: str, problem: Problem, start: Solution, **options) -> Learner:
    group = {"block_size": 16} if stage == "swaps" else {"block_size": 16, "rate": 2.0}
    name = "swaps" if stage == "swaps" else "published"
    settings = LearnSettings(stages=(stage,), **{name: group})
    return LEARNERS[stage](problem, start, settings, 8, **options)


def values(mask: Mask) -> Tensor:
    return mask.kept().float() if isinstance(mask, LearnedMask) else mask.detach()


@pytest.mark.parametrize("stage", STAGES)
def test_permutations_start_where_they_are_told(problem, start, stage: str) -> None:
    perms = learner_of(stage, problem, start).solution().perms
    assert perms.keys() == start.perms.keys()
    for name, perm in perms.items():
        assert same_groups(perm, start.perms[name], 4)


@pytest.mark.parametrize("stage", STAGES)
def test_whatever_is_learned_permutations_stay_legal_and_change(
    problem, start, generator: torch.Generator, stage: str
) -> None:
    learner = learner_of(stage, problem, start)
    learn_anything(learner, generator)
    solution = learner.solution()
    assert solution.multipliers == {}
    for name, perm in solution.perms.items():
        check_permutation(perm)
        segment = problem.spaces[name].space.segment
        size = SwapSettings(block_size=16).size_in(segment, 4)
        assert torch.equal(perm // segment, torch.arange(len(perm)) // segment)
        # Inside a block, the channels are those that the start put there.
        found, begun = perm.reshape(-1, size), start.perms[name].reshape(-1, size)
        assert torch.equal(found.sort(-1).values, begun.sort(-1).values)
        assert not same_groups(perm, start.perms[name], 4)


@pytest.mark.parametrize("stage", HARD)
@pytest.mark.parametrize("steps", [2, 8], ids=["warm", "cold"])
def test_what_is_trained_is_what_is_kept(
    problem, start, generator: torch.Generator, stage: str, steps: int
) -> None:
    """The masks of a step and those that the validation judges are the same."""
    learner = learner_of(stage, problem, start)
    learn_anything(learner, generator, steps)
    solution = learner.solution()
    learner.prepare(steps + 1)
    found, expected = learner.masks(), problem.masks(solution)
    assert found.keys() == expected.keys()
    for name, mask in expected.items():
        torch.testing.assert_close(values(found[name]), mask.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_get_gradients_through_the_model(
    problem, start, tokens: Tensor, stage: str
) -> None:
    learner = learner_of(stage, problem, start)
    with masked(problem.model, learner.masks()):
        problem.model(tokens, use_cache=False).logits.square().sum().backward()
    for parameter in leaves(learner):
        assert bool(torch.isfinite(parameter.grad).all())
        assert float((parameter.grad != 0).float().mean()) > 0.9


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_else_is_learned(problem, start, stage: str) -> None:
    """One parameter for all spaces of a shape, and no multipliers of scores."""
    shapes = [tuple(p.shape) for p in leaves(learner_of(stage, problem, start))]
    # residual: 2 blocks of 16, hidden: 3 of 16 a layer; value: 2 heads of 8 a layer.
    blocks = {(2, 16), (6, 16), (4, 8)}
    of_channel = 4 if stage == "swaps" else 1  # its groups, or its places
    assert len(shapes) == len(blocks)
    assert set(shapes) == {(n, size, size // of_channel) for n, size in blocks}


@pytest.mark.parametrize("stage", HARD)
def test_spaces_of_one_shape_are_learned_as_if_alone(
    problem, start, stage: str, make_problem
) -> None:
    together = learner_of(stage, problem, start).masks()
    for name in problem.spaces:
        alone = make_problem(problem.model, names=[name])
        part = Solution({name: start.perms[name]})
        for linear, mask in learner_of(stage, alone, part).masks().items():
            assert torch.equal(values(mask), values(together[linear]))


@pytest.mark.parametrize("stage", STAGES)
def test_fixed_spaces_keep_their_permutation_and_their_masks(
    problem, start, generator: torch.Generator, stage: str
) -> None:
    fixed = ["residual", "hidden.0"]
    learner = learner_of(stage, problem, start, fixed=fixed)
    learn_anything(learner, generator)
    for name, perm in learner.solution().perms.items():
        assert same_groups(perm, start.perms[name], 4) == (name in fixed)
    masks, expected = learner.masks(), problem.masks(start)
    for name in fixed:
        for consumer in problem.spaces[name].space.consumers:
            assert torch.equal(masks[consumer.name], expected[consumer.name])


@pytest.mark.parametrize("m", [2, 4, 8])
@pytest.mark.parametrize("segment", [8, 24, 48, 64])
@pytest.mark.parametrize("wanted", [8, 20, 64, 999])
def test_a_block_is_the_largest_that_fits(wanted: int, segment: int, m: int) -> None:
    fits = [
        s
        for s in range(1, segment + 1)
        if segment % s == 0 and s % m == 0 and s <= wanted
    ]
    assert SwapSettings(block_size=wanted).size_in(segment, m) == max(fits)


@pytest.mark.parametrize(("blocks", "size"), [(1, 48), (4, 12), (5, 8), (999, 4)])
def test_a_space_is_cut_into_so_many_blocks_or_more(blocks: int, size: int) -> None:
    assert SwapSettings(blocks_per_space=blocks).size_in(48, 4) == size
