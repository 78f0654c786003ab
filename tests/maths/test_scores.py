# SPDX-License-Identifier: Apache-2.0
"""Scores equal their formulas in float64, and are float32 whatever the weight is."""

import pytest
import torch

from nm_permute_plugin.maths.scores import magnitude, ria, score_weight, wanda

NAMES = ["wanda", "ria", "magnitude"]


@pytest.fixture
def weight(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(24, 16, generator=generator)


@pytest.fixture
def input_norm(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(16, generator=generator) * 10


def test_magnitude_is_the_absolute_weight(weight: torch.Tensor) -> None:
    assert torch.equal(magnitude(weight), weight.abs())


def test_wanda_equals_its_formula(
    weight: torch.Tensor, input_norm: torch.Tensor
) -> None:
    expected = weight.double().abs() * input_norm.double()
    torch.testing.assert_close(wanda(weight, input_norm).double(), expected)


@pytest.mark.parametrize("exponent", [0.5, 1.0], ids=["paper", "one"])
def test_ria_equals_its_formula(
    weight: torch.Tensor, input_norm: torch.Tensor, exponent: float
) -> None:
    size = weight.double().abs()
    relative = size / size.sum(0, keepdim=True) + size / size.sum(1, keepdim=True)
    expected = relative * input_norm.double() ** exponent
    torch.testing.assert_close(ria(weight, input_norm, exponent).double(), expected)


def test_ria_scores_rows_and_columns_of_zeros_zero(
    weight: torch.Tensor, input_norm: torch.Tensor
) -> None:
    weight[3], weight[:, 5] = 0, 0
    score = ria(weight, input_norm)
    assert bool((score[3] == 0).all())
    assert bool((score[:, 5] == 0).all())
    assert bool((score[4, :5] > 0).all())


def test_ria_of_a_weight_of_zeros_is_zero_not_nan(input_norm: torch.Tensor) -> None:
    assert torch.equal(ria(torch.zeros(3, 16), input_norm), torch.zeros(3, 16))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32],
    ids=["bf16", "fp16", "fp32"],
)
def test_scores_are_float32(
    weight: torch.Tensor, input_norm: torch.Tensor, name: str, dtype: torch.dtype
) -> None:
    score = score_weight(name, weight.to(dtype), input_norm)
    assert score.dtype == torch.float32
    assert torch.equal(score, score_weight(name, weight.to(dtype).float(), input_norm))


@pytest.mark.parametrize("name", NAMES)
def test_the_sign_of_a_weight_does_not_count(
    weight: torch.Tensor, input_norm: torch.Tensor, name: str
) -> None:
    mirrored = score_weight(name, -weight, input_norm)
    assert torch.equal(score_weight(name, weight, input_norm), mirrored)


@pytest.mark.parametrize("name", NAMES)
def test_scores_move_with_their_channels(
    weight: torch.Tensor,
    input_norm: torch.Tensor,
    generator: torch.Generator,
    name: str,
) -> None:
    perm = torch.randperm(16, generator=generator)
    moved = score_weight(name, weight[:, perm], input_norm[perm])
    torch.testing.assert_close(moved, score_weight(name, weight, input_norm)[:, perm])


def test_magnitude_needs_no_statistics(weight: torch.Tensor) -> None:
    assert torch.equal(score_weight("magnitude", weight, None), weight.abs())


@pytest.mark.parametrize("name", ["wanda", "ria"])
def test_missing_statistics_are_refused(weight: torch.Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*input norms"):
        score_weight(name, weight, None)
