# SPDX-License-Identifier: Apache-2.0
"""A linear under a learned mask: its values, and what its gradients mean."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nm_permute_plugin.maths.mask_gradients import (
    RowSample,
    grouped_mask,
    insertion_costs,
    multiplied,
    rivalry,
)
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.learn.grouping import Grouping
from nm_permute_plugin.pruning.learn.insertion import InsertionMask
from nm_permute_plugin.specs.spec import Consumer

ROWS, BLOCKS, GROUPS = 6, 2, 3


def random_mask(
    pattern: NMPattern, queries: int = 1, sample: RowSample | None = None
) -> InsertionMask:
    """Of a linear with 6 rows, in a random grouping of two blocks of three groups."""
    generator = torch.Generator().manual_seed(queries)
    size = GROUPS * pattern.m
    shape = (BLOCKS, size)
    consumer = Consumer("o", queries, size) if queries > 1 else Consumer("o")
    keys = torch.rand(shape, generator=generator).argsort()
    grouping = Grouping(
        torch.randperm(BLOCKS * size, generator=generator),
        torch.arange(GROUPS).repeat_interleave(pattern.m)[keys],
        pattern,
    )
    return InsertionMask(
        consumer,
        torch.rand(queries * ROWS, BLOCKS * size, generator=generator),
        grouping,
        torch.zeros((*shape, GROUPS), requires_grad=True),
        torch.randn(queries, *shape, generator=generator).div(4).requires_grad_(),
        sample or RowSample(),
    )


def inputs(mask: InsertionMask) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, 5, in], weight [6, in] and bias [6]."""
    generator = torch.Generator().manual_seed(9)
    width = mask.kept.shape[1]
    x = torch.randn(2, 5, width, generator=generator)
    weight = torch.randn(ROWS, width, generator=generator)
    return x.requires_grad_(), weight, torch.randn(ROWS, generator=generator)


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("queries", [1, 3])
def test_it_is_the_linear_under_the_grouped_mask(text: str, queries: int) -> None:
    mask = random_mask(NMPattern.parse(text), queries)
    grouping = mask.grouping
    scaled = multiplied(grouping.blocks(mask.score), mask.log_multiplier.detach())
    grouped = grouped_mask(scaled, grouping.column, grouping.pattern)
    assert torch.equal(grouping.blocks(mask.consumer.view(mask.kept)), grouped)
    x, weight, bias = inputs(mask)
    assert torch.equal(mask(x, weight, bias), F.linear(x, weight * mask.kept, bias))


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("stride", [1, 4])
def test_its_gradients_are_those_of_the_mask_for_moves_and_multipliers(
    queries: int, stride: int
) -> None:
    pattern = NMPattern(2, 4)
    mask = random_mask(pattern, queries, RowSample(stride // 2, stride))
    x, weight, bias = inputs(mask)
    plain = mask.kept.float().requires_grad_()
    towards = torch.randn(2, 5, ROWS, generator=torch.Generator().manual_seed(3))
    of_x, grad = torch.autograd.grad(
        F.linear(x, weight * plain, bias), (x, plain), towards
    )
    mask(x, weight, bias).backward(towards)
    torch.testing.assert_close(x.grad, of_x)
    grouping = mask.grouping
    scaled = multiplied(grouping.blocks(mask.score), mask.log_multiplier.detach())
    blocks = grouping.blocks(mask.consumer.view(grad))
    rows = slice(stride // 2, None, stride)
    expected = insertion_costs(scaled[rows], blocks[rows], grouping.column, pattern)
    torch.testing.assert_close(mask.choice.grad, expected, rtol=1e-4, atol=1e-4)
    of_score = rivalry(scaled, blocks, grouping.column, pattern)
    by_query = torch.stack([part.sum(0) for part in of_score.chunk(queries)])
    torch.testing.assert_close(mask.log_multiplier.grad, by_query, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fixed", ["choice", "log_multiplier"])
def test_what_is_not_learned_gets_no_gradient_and_the_other_its_own(fixed: str) -> None:
    both = random_mask(NMPattern(2, 4))
    one = replace(
        random_mask(NMPattern(2, 4)), **{fixed: getattr(both, fixed).detach()}
    )
    x, weight, bias = inputs(both)
    for mask in (both, one):
        mask(x, weight, bias).sum().backward()
    (learned,) = {"choice", "log_multiplier"} - {fixed}
    assert getattr(one, fixed).grad is None
    assert float(getattr(one, learned).grad.norm()) > 0
    assert torch.equal(getattr(one, learned).grad, getattr(both, learned).grad)


def test_the_gradient_of_the_weight_does_not_outlive_its_layer(tiny_model) -> None:
    """Of two linears in a row, the second's gradient is used up before the first's."""
    first, second = random_mask(NMPattern(2, 4)), random_mask(NMPattern(2, 4))
    width = first.kept.shape[1]
    order: list[str] = []
    first.choice.register_hook(lambda grad: order.append("first is used"))
    second.choice.register_hook(lambda grad: order.append("second is used"))
    x = torch.randn(4, width)
    weight = torch.randn(ROWS, width)
    middle = F.pad(first(x, weight, None), (0, width - ROWS))
    middle.register_hook(lambda grad: order.append("between"))
    second(middle, weight, None).sum().backward()
    assert order[-1] == "first is used"
    assert order.index("second is used") < 2
