# SPDX-License-Identifier: Apache-2.0
"""Linears read alike whichever way their weight is stored."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs.conv1d import (
    as_stored,
    bias_of,
    input_axis,
    is_linear,
    weight_of,
)
from nm_permute_plugin.specs.spec import resolve


def conv1d() -> Conv1D:
    """From 8 channels to 12: its weight is [8, 12]."""
    torch.manual_seed(0)
    return Conv1D(12, 8)


@pytest.mark.parametrize("make", [conv1d, lambda: nn.Linear(8, 12)], ids=["c", "l"])
def test_a_linear_is_its_weight_times_the_input(make) -> None:
    module = make()
    x = torch.randn(3, 8)
    assert is_linear(module)
    assert weight_of(module).shape == (12, 8)
    assert module.weight.shape[input_axis(module)] == 8
    ours = nn.functional.linear(x, weight_of(module), bias_of(module))
    torch.testing.assert_close(ours, module(x))
    assert torch.equal(as_stored(module, weight_of(module)), module.weight)


def test_what_else_has_a_weight_is_no_linear() -> None:
    others = [nn.Conv1d(8, 12, 1), nn.Embedding(8, 12), nn.LayerNorm(8)]
    assert [is_linear(module) for module in others] == [False] * 3
    assert bias_of(nn.Linear(8, 12, bias=False)) is None


def test_the_inputs_of_a_conv1d_are_held_against_the_pattern() -> None:
    model = nn.Sequential(Conv1D(12, 6))
    spec = {"0.weight": "_ _", "0.bias": "_"}
    message = r"0\.weight has its input channels in segments of 6, which M=4"
    with pytest.raises(ValueError, match=message):
        resolve(model, spec, NMPattern(2, 4), ["0"])
    resolved = resolve(nn.Sequential(Conv1D(6, 12)), spec, NMPattern(2, 4), ["0"])
    assert list(resolved.unordered) == ["0"]
