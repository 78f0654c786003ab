# SPDX-License-Identifier: Apache-2.0
"""Hard assignments are as good as the best that brute force finds."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from nm_permute_plugin.maths.assignment import assign, assign_later, order_by
from nm_permute_plugin.maths.permutation import check_permutation


def best_by_brute_force(benefit: torch.Tensor) -> float:
    """The largest sum over all ways to fill the columns' seats with the rows."""
    rows, columns = benefit.shape
    seats = [column for column in range(columns) for _ in range(rows // columns)]
    table = benefit.tolist()
    return max(
        sum(table[row][column] for row, column in enumerate(chosen))
        for chosen in permutations(seats)
    )


SHAPES = [(1, 1), (3, 3), (5, 5), (6, 2), (6, 3), (4, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]} rows {s[1]} columns")
@pytest.mark.parametrize("seed", range(3))
def test_no_assignment_is_better(shape: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    benefit = torch.randint(-9, 10, (2, *shape), generator=generator).float()
    column = assign(benefit)
    gained = benefit.gather(-1, column[..., None]).sum((-1, -2))
    assert gained.tolist() == [best_by_brute_force(block) for block in benefit]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
def test_every_column_takes_its_capacity(
    columns: int, capacity: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    benefit = torch.randn(3, columns * capacity, columns, generator=generator)
    for block in assign(benefit):
        assert torch.bincount(block, minlength=columns).tolist() == [capacity] * columns


def test_blocks_are_assigned_apart(generator: torch.Generator) -> None:
    benefit = torch.randn(4, 6, 6, generator=generator)
    alone = torch.cat([assign(block[None]) for block in benefit])
    assert torch.equal(assign(benefit), alone)


def test_the_assignment_of_learnt_logits_needs_no_detach(
    generator: torch.Generator,
) -> None:
    logits = torch.randn(1, 4, 4, generator=generator)
    column = assign(logits.clone().requires_grad_(True))
    assert torch.equal(column, assign(logits))


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        assign(torch.tensor([[[1.0, float("nan")], [0.0, 1.0]]]))


def test_rows_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows .* 2 columns"):
        assign(torch.zeros(1, 5, 2))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
def test_order_by_sets_the_columns_side_by_side(
    columns: int, capacity: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    seats = torch.arange(columns).repeat_interleave(capacity)
    column = seats[torch.randperm(len(seats), generator=generator)]
    (order,) = order_by(column[None])
    check_permutation(order)
    assert torch.equal(column[order], seats)
    groups = order.reshape(columns, capacity)
    assert torch.equal(groups, groups.sort(dim=-1).values)


def test_benefits_that_change_later_do_not_count(generator: torch.Generator) -> None:
    benefit = torch.randn(5, 8, 4, generator=generator)
    expected = assign(benefit)
    columns = assign_later(benefit.clone())
    kept = benefit.clone()
    again = assign_later(kept)
    kept.neg_()
    assert torch.equal(columns(), expected)
    assert torch.equal(again(), expected)


@pytest.mark.parametrize("capacity", [1, 4])
def test_wishes_that_all_come_true_are_what_the_solver_finds(
    generator: torch.Generator, capacity: int
) -> None:
    """The short cut, on every second block, takes nothing away from exactness."""
    benefit = torch.randn(6, 8, 8 // capacity, generator=generator)
    seats = torch.arange(8 // capacity).repeat_interleave(capacity)
    benefit[::2] += 9 * torch.nn.functional.one_hot(seats)
    for block, column in zip(benefit, assign(benefit), strict=True):
        square = block.repeat_interleave(capacity, dim=-1).numpy()
        expected = linear_sum_assignment(square, maximize=True)[1] // capacity
        assert column.tolist() == expected.tolist()
