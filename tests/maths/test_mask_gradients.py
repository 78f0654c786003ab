# SPDX-License-Identifier: Apache-2.0
"""Masks of grouped channels: hard values, and what their gradients mean."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from nm_permute_plugin.maths.assignment import order_by
from nm_permute_plugin.maths.mask_gradients import score_gradient
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import invert
from nm_permute_plugin.maths.swaps import grouped_mask, move_costs

PATTERNS = ["2:4", "1:2", "1:4", "3:4", "4:8"]
ROWS, BLOCKS, GROUPS = 7, 2, 3


def random_case(pattern: NMPattern, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and mask gradients [rows, blocks, size], and a random grouping."""
    generator = torch.Generator().manual_seed(seed)
    size = GROUPS * pattern.m
    score = torch.rand(ROWS, BLOCKS, size, generator=generator)
    grad = torch.randn(ROWS, BLOCKS, size, generator=generator)
    seats = torch.arange(GROUPS).repeat_interleave(pattern.m)
    keys = torch.rand(BLOCKS, size, generator=generator).argsort()
    return score, grad, seats[keys]


def cost_beside(
    score: Tensor, grad: Tensor, channel: int, companions: list[int], n: int
) -> float:
    """``sum_r [s_rc > t_r] (G_rc - G_r,out)`` with the M-1 companions spelt out."""
    total = 0.0
    for s, g in zip(score.tolist(), grad.tolist(), strict=True):
        out = sorted(companions, key=lambda c: s[c], reverse=True)[n - 1]
        if s[channel] > s[out]:
            total += g[channel] - g[out]
    return total


def costs_by_brute_force(
    score: Tensor, grad: Tensor, group_of: Tensor, pattern: NMPattern
) -> Tensor:
    """Every channel beside every possible set of companions, in plain Python."""
    costs = torch.zeros(BLOCKS, score.shape[-1], GROUPS, dtype=torch.float64)
    for block in range(BLOCKS):
        groups = [
            (group_of[block] == g).nonzero().flatten().tolist() for g in range(GROUPS)
        ]
        for channel in range(score.shape[-1]):
            for group, members in enumerate(groups):
                others = [member for member in members if member != channel]
                sets = list(combinations(others, pattern.m - 1))
                costs[block, channel, group] = sum(
                    cost_beside(
                        score[:, block],
                        grad[:, block],
                        channel,
                        list(beside),
                        pattern.n,
                    )
                    for beside in sets
                ) / len(sets)
    return costs


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("seed", [0, 1])
def test_move_costs_equal_those_of_every_move_tried(text: str, seed: int) -> None:
    pattern = NMPattern.parse(text)
    score, grad, group_of = random_case(pattern, seed)
    found = move_costs(score, grad, group_of, pattern)
    expected = costs_by_brute_force(score, grad, group_of, pattern)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_rows_that_come_in_parts_add_up() -> None:
    # More than 2**20 elements a step: several parts on a CPU.
    pattern = NMPattern(2, 4)
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(700, 2, 64, generator=generator)
    grad = torch.randn(700, 2, 64, generator=generator)
    group_of = (torch.arange(64) % 16).expand(2, -1).contiguous()
    whole = move_costs(score, grad, group_of, pattern)
    halves = sum(
        move_costs(score[part], grad[part], group_of, pattern)
        for part in (slice(0, 300), slice(300, 700))
    )
    torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-3)


def test_scores_that_are_equal_push_nothing_out() -> None:
    # By the formula [s > t] a channel no better than the threshold does not enter.
    pattern = NMPattern(2, 4)
    _, grad, group_of = random_case(pattern)
    costs = move_costs(torch.ones_like(grad), grad, group_of, pattern)
    assert torch.equal(costs, torch.zeros_like(costs))


def test_move_costs_do_not_depend_on_the_names_of_groups() -> None:
    pattern = NMPattern(2, 4)
    score, grad, group_of = random_case(pattern)
    renamed = torch.tensor([2, 0, 1])
    costs = move_costs(score, grad, group_of, pattern)
    again = move_costs(score, grad, renamed[group_of], pattern)
    torch.testing.assert_close(again[..., renamed], costs)


@pytest.mark.parametrize("text", PATTERNS)
def test_a_grouped_mask_is_the_mask_of_the_grouped_channels(text: str) -> None:
    pattern = NMPattern.parse(text)
    score, _, group_of = random_case(pattern)
    mask = grouped_mask(score, group_of, pattern)
    for block in range(BLOCKS):
        (order,) = order_by(group_of[block][None])
        expected = nm_mask(score[:, block, order], pattern)[:, invert(order)]
        assert torch.equal(mask[:, block], expected)


def test_a_grouped_mask_breaks_ties_as_the_mask_does() -> None:
    group_of = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0]])
    mask = grouped_mask(torch.ones(1, 1, 8), group_of, NMPattern(2, 4))
    # Group 0 holds channels 1, 3, 4, 7; group 1 holds 0, 2, 5, 6: the lower two stay.
    assert mask.flatten().tolist() == [True] * 4 + [False] * 4


def test_a_score_has_the_gradient_of_a_soft_choice_between_it_and_its_runner_up() -> (
    None
):
    """Against numbers worked out by hand: one group, one runner-up a weight."""
    score = torch.tensor([4.0, 1.0, 3.0, 2.0]).view(1, 1, 4)
    grad = torch.tensor([0.5, -1.0, 2.0, 0.25]).view(1, 1, 4)
    found = score_gradient(score, grad, NMPattern(2, 4), softness=0.5).flatten()
    # Kept are 4 and 3; the best that was dropped is 2, the worst that was kept is 3.
    expected = [
        (4.0, 2.0, 0.5 - 0.25),
        (1.0, 3.0, -3.0),
        (3.0, 2.0, 1.75),
        (2.0, 3.0, -1.75),
    ]
    for value, (own, runner_up, change) in zip(found.tolist(), expected, strict=True):
        chance = 1 / (1 + (runner_up / own) ** 2)
        assert value == pytest.approx(change * chance * (1 - chance) / 0.5, rel=1e-5)


@pytest.mark.parametrize("text", PATTERNS)
def test_groups_have_the_gradients_that_they_have_alone(text: str) -> None:
    pattern = NMPattern.parse(text)
    score, grad, _ = random_case(pattern)
    score, grad = (x.flatten(1).unflatten(1, (-1, pattern.m)) for x in (score, grad))
    whole = score_gradient(score, grad, pattern)
    for row, group in [(0, 0), (3, 1), (6, 5)]:
        part = slice(row, row + 1), slice(group, group + 1)
        alone = score_gradient(score[part], grad[part], pattern)
        torch.testing.assert_close(whole[part], alone)
        assert float(alone.abs().max()) > 0


def test_a_score_of_zero_has_a_finite_gradient() -> None:
    grad = random_case(NMPattern(2, 4))[1].unflatten(-1, (GROUPS, 4))[:, 0]
    found = score_gradient(torch.zeros_like(grad), grad, NMPattern(2, 4))
    assert found.isfinite().all()
    assert float(found.abs().max()) > 0
