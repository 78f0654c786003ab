# SPDX-License-Identifier: Apache-2.0
"""Shares of a loss: every group of masks gets its part, and the parts add up."""

import pytest
import torch
import whole_runs

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.budget.fused import fused_linears
from nm_permute_plugin.pruning.budget.shares import POINTS, shares_of_loss
from nm_permute_plugin.pruning.running.masked import masked
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import LossSettings, MemorySettings


@pytest.fixture
def case(tiny_model, data):
    model = tiny_model("llama")
    linears = whole_runs.linears(model)
    groups = fused_linears(model, whole_runs.resolved_of(model, linears), linears)
    masks = {
        name: nm_mask(model.get_submodule(name).weight.detach().abs(), NMPattern(2, 4))
        for name in linears
    }
    return Teacher(model, LossSettings()), masks, groups, data.validation


def test_the_shares_add_up_to_what_all_masks_cost(case):
    teacher, masks, groups, batches = case
    shares = shares_of_loss(teacher, masks, groups, batches, MemorySettings())
    assert len(shares) == len(groups) == 8
    assert float(shares.sum()) == pytest.approx(
        teacher.validate(masks, batches), rel=0.03
    )
    assert teacher.validate({}, batches) == pytest.approx(0, abs=1e-6)


def test_a_mask_that_drops_nothing_costs_nothing(case):
    teacher, masks, groups, batches = case
    for name in groups[2].linears:
        masks[name] = torch.ones_like(masks[name])
    shares = shares_of_loss(teacher, masks, groups, batches, MemorySettings())
    assert shares[2] == 0
    assert bool((shares != 0).sum() == 7)


def test_a_share_is_the_slope_along_the_way(case):
    """Against differences of the loss, with all masks opened by hand."""
    teacher, masks, groups, batches = case
    model = teacher.model

    def loss(opening, of_group):
        def part(name):
            number = of_group if name in groups[3].linears else opening
            return masks[name].float() + number * (~masks[name]).float()

        return teacher.validate({name: part(name) for name in masks}, batches)

    step, expected = 1e-2, 0.0
    for point in range(POINTS):
        opening = (point + 0.5) / POINTS
        slope = loss(opening, opening + step) - loss(opening, opening - step)
        expected -= slope / (2 * step) / POINTS
    shares = shares_of_loss(teacher, masks, groups, batches, MemorySettings())
    assert float(shares[3]) == pytest.approx(expected, rel=0.01)
    with masked(model, {}):
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_micro_batches_give_the_same(case):
    teacher, masks, groups, batches = case
    whole, parts = (
        shares_of_loss(
            teacher, masks, groups, batches, MemorySettings(micro_batch_size=size)
        )
        for size in (None, 1)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
