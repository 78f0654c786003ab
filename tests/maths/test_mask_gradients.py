# SPDX-License-Identifier: Apache-2.0
"""Masks that depend on an assignment: hard values, and what their gradients mean."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from nm_permute_plugin.maths.assignment import order_by
from nm_permute_plugin.maths.mask_gradients import (
    Reorder,
    RowSample,
    grouped_mask,
    insertion_costs,
    multiplied,
    permuted_mask,
    rivalry,
)
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import invert

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
    score: Tensor, grad: Tensor, column: Tensor, pattern: NMPattern
) -> Tensor:
    """Every channel beside every possible set of companions, in plain Python."""
    costs = torch.zeros(BLOCKS, score.shape[-1], GROUPS, dtype=torch.float64)
    for block in range(BLOCKS):
        groups = [
            (column[block] == g).nonzero().flatten().tolist() for g in range(GROUPS)
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
def test_insertion_costs_equal_those_of_every_move_tried(text: str, seed: int) -> None:
    pattern = NMPattern.parse(text)
    score, grad, column = random_case(pattern, seed)
    found = insertion_costs(score, grad, column, pattern)
    expected = costs_by_brute_force(score, grad, column, pattern)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_rows_that_come_in_parts_add_up() -> None:
    # More than 2**20 elements a step: several parts on a CPU.
    pattern = NMPattern(2, 4)
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(700, 2, 64, generator=generator)
    grad = torch.randn(700, 2, 64, generator=generator)
    column = (torch.arange(64) % 16).expand(2, -1).contiguous()
    whole = insertion_costs(score, grad, column, pattern)
    halves = sum(
        insertion_costs(score[part], grad[part], column, pattern)
        for part in (slice(0, 300), slice(300, 700))
    )
    torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-3)


def test_scores_that_are_equal_push_nothing_out() -> None:
    # By the formula [s > t] a channel no better than the threshold does not enter.
    pattern = NMPattern(2, 4)
    _, grad, column = random_case(pattern)
    costs = insertion_costs(torch.ones_like(grad), grad, column, pattern)
    assert torch.equal(costs, torch.zeros_like(costs))


def test_insertion_costs_do_not_depend_on_the_names_of_groups() -> None:
    pattern = NMPattern(2, 4)
    score, grad, column = random_case(pattern)
    renamed = torch.tensor([2, 0, 1])
    costs = insertion_costs(score, grad, column, pattern)
    again = insertion_costs(score, grad, renamed[column], pattern)
    torch.testing.assert_close(again[..., renamed], costs)


@pytest.mark.parametrize("text", PATTERNS)
def test_a_grouped_mask_is_the_mask_of_the_grouped_channels(text: str) -> None:
    pattern = NMPattern.parse(text)
    score, _, column = random_case(pattern)
    mask = grouped_mask(score, column, pattern)
    for block in range(BLOCKS):
        (order,) = order_by(column[block][None])
        expected = nm_mask(score[:, block, order], pattern)[:, invert(order)]
        assert torch.equal(mask[:, block], expected)


def test_a_grouped_mask_breaks_ties_as_the_mask_does() -> None:
    column = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0]])
    mask = grouped_mask(torch.ones(1, 1, 8), column, NMPattern(2, 4))
    # Group 0 holds channels 1, 3, 4, 7; group 1 holds 0, 2, 5, 6: the lower two stay.
    assert mask.flatten().tolist() == [True] * 4 + [False] * 4


def test_multipliers_scale_the_rows_of_their_section() -> None:
    score = torch.ones(4, 1, 2)
    logs = torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]]])
    rows = multiplied(score, logs).squeeze(1)
    e = torch.tensor(1.0).exp().item()
    expected = [[1, pytest.approx(e)]] * 2 + [[pytest.approx(e**2), 1]] * 2
    assert rows.tolist() == expected


def test_rivalry_is_the_gradient_of_a_soft_choice_between_rivals() -> None:
    """Against numbers worked out by hand: one group, one rival a weight."""
    score = torch.tensor([4.0, 1.0, 3.0, 2.0]).view(1, 1, 4)
    grad = torch.tensor([0.5, -1.0, 2.0, 0.25]).view(1, 1, 4)
    column = torch.zeros(1, 4, dtype=torch.long)
    found = rivalry(score, grad, column, NMPattern(2, 4), softness=0.5).flatten()
    # Kept are 4 and 3; the best that was dropped is 2, the worst that was kept is 3.
    rivals = [
        (4.0, 2.0, 0.5 - 0.25),
        (1.0, 3.0, -3.0),
        (3.0, 2.0, 1.75),
        (2.0, 3.0, -1.75),
    ]
    for value, (own, rival, change) in zip(found.tolist(), rivals, strict=True):
        chance = 1 / (1 + (rival / own) ** 2)
        assert value == pytest.approx(change * chance * (1 - chance) / 0.5, rel=1e-5)


def test_a_score_of_zero_has_a_finite_rivalry() -> None:
    score, grad, column = random_case(NMPattern(2, 4))
    assert rivalry(score * 0, grad, column, NMPattern(2, 4)).isfinite().all()


@pytest.mark.parametrize("limit", [None, 1, 30, 40, 100, 999])
def test_samples_of_consecutive_steps_take_every_row_once(limit: int | None) -> None:
    samples = [RowSample.of_step(100, limit, step) for step in range(300)]
    (stride,) = {sample.stride for sample in samples}
    taken = [list(range(100))[s.offset :: s.stride] for s in samples[:stride]]
    assert sorted(row for rows in taken for row in rows) == list(range(100))
    assert max(len(rows) for rows in taken) <= (limit or 100)
    assert samples[stride] == samples[0]


def test_reordering_has_the_gradient_of_indexing(generator: torch.Generator) -> None:
    matrix = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    perm = torch.randperm(6, generator=generator)
    assert torch.equal(Reorder.apply(matrix, perm), matrix[:, perm])
    matrix.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda m: Reorder.apply(m, perm), (matrix,))


def hard_places(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Permutations as index vectors [blocks, size] and as matrices of zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(BLOCKS, size, generator=generator).argsort()
    places = torch.nn.functional.one_hot(order, size).transpose(-1, -2)
    return order, places.float()


@pytest.mark.parametrize("text", PATTERNS)
def test_hard_places_give_the_mask_of_the_permuted_channels(text: str) -> None:
    pattern = NMPattern.parse(text)
    score, _, _ = random_case(pattern)
    order, places = hard_places(score.shape[-1], seed=0)
    mask = permuted_mask(score, places, pattern)
    for block in range(BLOCKS):
        permuted = nm_mask(score[:, block, order[block]], pattern)
        expected = permuted[:, invert(order[block])].float()
        torch.testing.assert_close(mask[:, block], expected, rtol=0, atol=1e-6)


def test_the_gradient_of_a_permuted_mask_is_that_of_its_formula() -> None:
    """``top_N`` has the gradient of N times the softmax of scores over their mean."""
    pattern = NMPattern(2, 4)
    score, grad, _ = random_case(pattern)
    _, places = hard_places(score.shape[-1], seed=1)
    ours, plain = (places.clone().requires_grad_(True) for _ in range(2))
    permuted_mask(score, ours, pattern).backward(grad)
    groups = (score.transpose(0, 1) @ plain).unflatten(-1, (GROUPS, pattern.m))
    scale = groups.detach().mean(-1, keepdim=True)
    soft = pattern.n * torch.softmax(groups / scale, dim=-1)
    hard = torch.zeros_like(soft).scatter_(
        -1, groups.detach().topk(pattern.n, dim=-1).indices, 1.0
    )
    top = (hard + soft - soft.detach()).flatten(-2)
    (top @ plain.transpose(-1, -2)).transpose(0, 1).backward(grad)
    assert float(ours.grad.abs().max()) > 0
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_rows_of_zeros_leave_the_gradient_finite() -> None:
    score, grad, _ = random_case(NMPattern(2, 4))
    score[2] = 0
    _, places = hard_places(score.shape[-1], seed=1)
    places.requires_grad_(True)
    permuted_mask(score, places, NMPattern(2, 4)).backward(grad)
    assert bool(torch.isfinite(places.grad).all())
