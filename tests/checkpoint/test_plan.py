# SPDX-License-Identifier: Apache-2.0
"""The first group that breaks a pattern is found and named."""

import pytest
import torch

from nm_permute_plugin.checkpoint.plan import find_excess
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern

PATTERNS = ["1:2", "2:4", "1:4", "3:4", "4:8", "2:8", "5:16"]


@pytest.mark.parametrize("text", PATTERNS)
def test_a_masked_weight_holds_no_violation(
    text: str, generator: torch.Generator
) -> None:
    pattern = NMPattern.parse(text)
    weight = torch.randn(5, 4 * pattern.m, generator=generator)
    masked = weight.masked_fill(~nm_mask(weight.abs(), pattern), 0)
    assert find_excess(masked, pattern) is None
    assert find_excess(weight, pattern) == (0, 0, pattern.m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
def test_the_first_violation_is_named(dtype: torch.dtype) -> None:
    weight = torch.zeros(4, 12, dtype=dtype)
    weight[2, 8:11] = 1
    weight[3, 0:4] = 1
    assert find_excess(weight, NMPattern(2, 4)) == (2, 8, 3)


def test_fewer_than_n_non_zeros_are_no_violation() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert find_excess(weight, NMPattern(2, 4)) is None
