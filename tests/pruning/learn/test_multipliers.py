# SPDX-License-Identifier: Apache-2.0
"""Multipliers of scores: what their masks are, and what their gradients mean."""

import pytest
import torch
from learning import learn_anything, leaves
from torch import Tensor, nn

from nm_permute_plugin.maths.mask_gradients import score_gradient
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import invert
from nm_permute_plugin.pruning.learn.multipliers import (
    MultipliedMask,
    ScoreMultipliers,
    row_groups,
)
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.running.masked import masked
from nm_permute_plugin.pruning.settings import LearnSettings
from nm_permute_plugin.specs.spec import Consumer

ROWS, WIDTH = 6, 24


def random_mask(pattern: NMPattern, queries: int = 1, rows: int = 3) -> MultipliedMask:
    """Of a linear with 6 rows, as many of which share multipliers."""
    generator = torch.Generator().manual_seed(queries)
    score = torch.rand(queries * ROWS, WIDTH, generator=generator)
    perm = torch.randperm(WIDTH, generator=generator)
    log = torch.randn(queries * ROWS // rows, WIDTH, generator=generator).div(4)
    return MultipliedMask(
        Consumer("o", queries, WIDTH) if queries > 1 else Consumer("o"),
        score,
        perm,
        log.requires_grad_(),
        pattern,
    )


def scaled(mask: MultipliedMask) -> Tensor:
    """The scores times their multipliers, row by row."""
    rows = len(mask.score) // len(mask.log_multiplier)
    factors = mask.log_multiplier.detach().exp()
    return mask.score * factors.repeat_interleave(rows, 0)


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("queries", [1, 3])
def test_it_is_the_mask_of_the_multiplied_scores_in_their_order(
    text: str, queries: int
) -> None:
    mask = random_mask(NMPattern.parse(text), queries)
    expected = nm_mask(scaled(mask)[:, mask.perm], mask.pattern)[:, invert(mask.perm)]
    assert torch.equal(mask.consumer.view(mask.kept()), expected)
    plain = nm_mask(mask.score[:, mask.perm], mask.pattern)[:, invert(mask.perm)]
    assert not torch.equal(expected, plain)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_its_gradients_are_those_of_the_scores_summed_over_their_rows(
    queries: int, rows: int
) -> None:
    mask = random_mask(NMPattern(2, 4), queries, rows)
    width = queries * WIDTH
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(9))
    model = nn.Sequential(nn.Linear(width, ROWS))
    plain = mask.kept().float().requires_grad_()
    for each in (plain, mask):
        with masked(model, {"0": each}):
            model(x).square().sum().backward()

    def grouped(matrix: Tensor) -> Tensor:
        return matrix[:, mask.perm].unflatten(1, (-1, 4))

    of_mask = mask.consumer.view(plain.grad)
    of_scores = score_gradient(
        grouped(scaled(mask)), grouped(of_mask), mask.pattern
    ).flatten(1)[:, invert(mask.perm)]
    by_rows = torch.stack([part.sum(0) for part in of_scores.split(rows)])
    assert float(by_rows.abs().max()) > 0
    torch.testing.assert_close(mask.log_multiplier.grad, by_rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("most", [None, 1, 5, 16, 99])
@pytest.mark.parametrize("queries", [1, 2])
def test_row_groups_are_as_few_as_may_be(most: int | None, queries: int) -> None:
    groups = row_groups(48 * queries, queries, most)
    fits = [n for n in range(1, 49) if 48 % n == 0 and 48 // n <= (most or 48)]
    assert groups == queries * min(fits)


def learner_of(problem: Problem, start: Solution, **settings) -> ScoreMultipliers:
    learn = LearnSettings(multipliers={"rate": 0.3, **settings})
    return ScoreMultipliers(problem, start, learn, steps=8)


def test_they_start_at_1_and_permutations_stay(
    problem: Problem, start: Solution, generator: torch.Generator
) -> None:
    learner = learner_of(problem, start)
    for factors in learner.solution().multipliers.values():
        assert torch.equal(factors, torch.ones_like(factors))
    learn_anything(learner, generator)
    found = learner.solution()
    assert found.perms.keys() == start.perms.keys()
    assert all(torch.equal(found.perms[n], perm) for n, perm in start.perms.items())
    for factors in found.multipliers.values():
        assert bool((factors > 0).all())
        assert bool((factors != 1).all())


@pytest.mark.parametrize("rows", [None, 16, 1])
def test_every_linear_has_one_row_of_multipliers_for_so_many_rows(
    problem: Problem, start: Solution, rows: int | None
) -> None:
    solution = learner_of(problem, start, rows=rows).solution()
    assert solution.multipliers.keys() == set(problem.linears)
    for name, factors in solution.multipliers.items():
        linear = problem.model.get_submodule(name)
        groups = linear.out_features // (rows or linear.out_features)
        assert factors.shape == (groups, linear.in_features)


def test_what_is_trained_is_what_is_kept(
    problem: Problem, start: Solution, generator: torch.Generator
) -> None:
    """The masks of a step and those that the validation judges are the same."""
    learner = learner_of(problem, start)
    learn_anything(learner, generator)
    masks, expected = learner.masks(), problem.masks(learner.solution())
    assert masks.keys() == expected.keys()
    for name, mask in expected.items():
        assert torch.equal(masks[name].kept(), mask)
    plain = problem.masks(start)
    assert any(not torch.equal(mask, plain[name]) for name, mask in expected.items())


def test_they_get_gradients_through_the_model(
    problem: Problem, start: Solution, tokens: Tensor
) -> None:
    learner = learner_of(problem, start)
    with masked(problem.model, learner.masks()):
        problem.model(tokens, use_cache=False).logits.square().sum().backward()
    found = leaves(learner)
    assert len(found) == len(problem.linears)
    for parameter in found:
        assert bool(torch.isfinite(parameter.grad).all())
        assert float((parameter.grad != 0).float().mean()) > 0.9
    grads = [parameter.grad for parameter in found]
    learner.update()
    # The next backward pass adds to zeros, where a captured graph finds them.
    assert all(p.grad is grad for p, grad in zip(found, grads, strict=True))
    assert not any(bool(grad.any()) for grad in grads)


def test_the_rate_falls_to_0(problem: Problem, start: Solution) -> None:
    learner = learner_of(problem, start)
    (first, *_) = leaves(learner)
    moves = []
    for _ in range(8):
        before = first.detach().clone()
        sum(leaf.sum() for leaf in leaves(learner)).backward()
        learner.update()
        moves.append(float((before - first.detach()).mean()))
    expected = [0.3 * (1 - step * (1 - 1 / 8) / 8) for step in range(8)]
    assert moves == pytest.approx(expected, rel=1e-3)
