# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn's row and column sums, its limit at low temperature, and the annealing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nm_permute_plugin.maths.assignment import assign
from nm_permute_plugin.maths.sinkhorn import annealed, sinkhorn

SHAPES = [(4, 8, 8), (4, 8, 2), (1, 12, 3), (5, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_sum_to_one_and_columns_to_their_capacity(
    shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    soft = sinkhorn(torch.randn(shape, generator=generator), iterations=200)
    _, rows, columns = shape
    assert bool((soft >= 0).all())
    torch.testing.assert_close(soft.sum(-1), torch.ones(soft.shape[:-1]))
    expected = torch.full((shape[0], columns), rows / columns)
    torch.testing.assert_close(soft.sum(-2), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns_are_exact_after_one_iteration(
    shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    soft = sinkhorn(torch.randn(shape, generator=generator), iterations=1)
    expected = torch.full((shape[0], shape[2]), shape[1] / shape[2])
    torch.testing.assert_close(soft.sum(-2), expected)


@pytest.mark.parametrize("shape", [(6, 6, 6), (6, 8, 2)], ids=["places", "groups"])
def test_low_temperature_approaches_the_hard_assignment(
    shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    # The temperature decides once it is small beside the lead of the best assignment.
    noise = torch.randn(shape, generator=generator)
    column = assign(noise)
    hard = torch.nn.functional.one_hot(column, shape[-1]).float()
    logits = noise + hard
    assert torch.equal(assign(logits), column)
    errors = [
        float((sinkhorn(logits, temperature, iterations=500) - hard).abs().max())
        for temperature in (1.0, 0.3, 0.1, 0.03)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 < 0.2 < errors[0]


@given(st.integers(0, 999), st.floats(-50, 50), st.floats(-50, 50))
def test_a_bonus_for_a_row_or_a_column_changes_nothing(
    seed: int, of_row: float, of_column: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    changed = logits.clone()
    changed[2] += of_row
    changed[:, 3] += of_column
    before, after = sinkhorn(logits, 1.0, 500), sinkhorn(changed, 1.0, 500)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)


def test_large_logits_stay_finite(generator: torch.Generator) -> None:
    logits = torch.randn(2, 6, 6, generator=generator) * 1e4
    logits.requires_grad_(True)
    soft = sinkhorn(logits, 0.01)
    soft.square().sum().backward()
    assert bool(torch.isfinite(soft).all())
    assert bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize(
    ("temperature", "iterations"), [(0.0, 5), (-1.0, 5), (1.0, 0)], ids=str
)
def test_settings_without_a_meaning_are_refused(
    temperature: float, iterations: int
) -> None:
    with pytest.raises(ValueError, match=f"got {temperature} and {iterations}"):
        sinkhorn(torch.zeros(2, 2), temperature, iterations)


@given(st.integers(2, 300), st.floats(0.5, 5), st.floats(0.01, 0.4))
def test_annealing_goes_from_start_to_end_in_equal_ratios(
    steps: int, start: float, end: float
) -> None:
    values = [annealed(step, steps, start, end) for step in range(steps)]
    assert values[0] == pytest.approx(start)
    assert values[-1] == pytest.approx(end)
    ratios = [after / before for before, after in zip(values, values[1:], strict=False)]
    assert ratios == pytest.approx([(end / start) ** (1 / (steps - 1))] * len(ratios))


def test_a_single_step_is_taken_at_the_end() -> None:
    assert annealed(0, 1, 1.0, 0.1) == 0.1
