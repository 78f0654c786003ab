# SPDX-License-Identifier: Apache-2.0
"""Orders as parameters: where they start, what their masks are, how blocks are cut."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from helpers import same_groups
from torch import Tensor, nn

from nm_permute_plugin.maths.assignment import assign_later
from nm_permute_plugin.maths.mask_gradients import RowSample
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import check_permutation
from nm_permute_plugin.pruning.learn.insertion import InsertionMask
from nm_permute_plugin.pruning.learn.order_shape import Learns, OrderShape, Relaxation
from nm_permute_plugin.pruning.learn.orders import LearnableOrders
from nm_permute_plugin.pruning.running.masked import Mask, masked
from nm_permute_plugin.pruning.stacking import StackedScore

RELAXATIONS = get_args(Relaxation)
TWO_OF_FOUR = NMPattern(2, 4)
SHAPE = OrderShape(block_size=16)
PLACES = replace(SHAPE, relaxation="straight_through")


@pytest.fixture
def model(tiny_model) -> nn.Module:
    return tiny_model("llama")


@pytest.fixture
def stacks(model: nn.Module, resolve_model) -> dict[str, StackedScore]:
    """Every space of a model with shared key/value heads."""
    scores = {
        name: module.weight.detach().abs()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    spaces = resolve_model(model).spaces
    return {name: StackedScore.of(space, scores) for name, space in spaces.items()}


@pytest.fixture
def start(model: nn.Module, resolve_model, legal_perms) -> dict[str, Tensor]:
    return legal_perms(resolve_model(model))


def _readers(stack: StackedScore) -> list[str]:
    return [consumer.name for consumer in stack.space.consumers]


def _values(mask: Mask) -> Tensor:
    return mask.kept.float() if isinstance(mask, InsertionMask) else mask


def _learned(mask: Mask) -> Tensor:
    return mask.choice if isinstance(mask, InsertionMask) else mask


def _learn_anything(orders: LearnableOrders, generator: torch.Generator) -> None:
    """Random logits, or swaps by random costs."""
    with torch.no_grad():
        for logits in orders.logits():
            logits.normal_(generator=generator)
    for _ in range(0 if orders.logits() else 5):
        for bundle in orders.bundles:
            costs = torch.randn(bundle.choice.shape, generator=generator)
            bundle.choice.grad = costs
        orders.swap(1.0)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_orders_start_where_they_are_told(
    stacks, start, relaxation: Relaxation
) -> None:
    shape = replace(SHAPE, relaxation=relaxation)
    perms = LearnableOrders(stacks, start, TWO_OF_FOUR, shape, torch.float32).perms()
    assert set(perms) == set(start)
    for name, perm in perms.items():
        assert same_groups(perm, start[name], 4)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_whatever_is_learned_orders_stay_legal_and_change(
    stacks, start, generator: torch.Generator, relaxation: Relaxation
) -> None:
    shape = replace(SHAPE, relaxation=relaxation)
    orders = LearnableOrders(stacks, start, TWO_OF_FOUR, shape, torch.float32)
    _learn_anything(orders, generator)
    for name, perm in orders.perms().items():
        check_permutation(perm)
        segment = stacks[name].space.segment
        size = shape.size_in(segment, 4)
        assert torch.equal(perm // segment, torch.arange(len(perm)) // segment)
        # Inside a block, the channels are those that the start put there.
        blocks, begun = perm.reshape(-1, size), start[name].reshape(-1, size)
        assert torch.equal(blocks.sort(-1).values, begun.sort(-1).values)
        assert not same_groups(perm, start[name], 4)


@pytest.mark.parametrize("relaxation", ["insertion", "straight_through"])
@pytest.mark.parametrize("temperature", [1.0, 0.1], ids=["warm", "cold"])
def test_what_is_trained_is_what_is_kept(
    stacks,
    start,
    generator: torch.Generator,
    relaxation: Relaxation,
    temperature: float,
) -> None:
    """The hard order of a training step and the order that a look judges are one."""
    shape = replace(SHAPE, relaxation=relaxation)
    orders = LearnableOrders(stacks, start, TWO_OF_FOUR, shape, torch.float32)
    _learn_anything(orders, generator)
    perms, found = orders.perms(), orders.at(temperature, step=0).masks()
    assert {linear for stack in stacks.values() for linear in _readers(stack)} == set(
        found
    )
    assert all(leaf.requires_grad for leaf in map(_learned, found.values()))
    different = [
        linear
        for name, stack in stacks.items()
        for linear, mask in stack.masks(perms[name], TWO_OF_FOUR).items()
        if not torch.allclose(_values(found[linear]), mask.float(), rtol=0, atol=1e-4)
    ]
    assert different == []


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
def test_masks_have_the_dtype_of_the_weights(
    stacks, start, relaxation: Relaxation
) -> None:
    shape = replace(SHAPE, relaxation=relaxation)
    orders = LearnableOrders(stacks, start, TWO_OF_FOUR, shape, torch.bfloat16)
    masks = orders.at(1.0, step=0).masks()
    assert {mask.dtype for mask in masks.values()} == {torch.bfloat16}
    sum(mask.float().square().sum() for mask in masks.values()).backward()
    assert all(logits.grad.dtype == torch.float32 for logits in orders.logits())


def test_soft_masks_keep_n_of_m_on_the_average(
    stacks, start, generator: torch.Generator
) -> None:
    shape = replace(SHAPE, relaxation="soft", sinkhorn_iterations=100)
    orders = LearnableOrders(stacks, start, TWO_OF_FOUR, shape, torch.float32)
    _learn_anything(orders, generator)
    for mask in orders.at(1.0, step=0).masks().values():
        assert float(mask.detach().min()) >= -1e-5
        assert float(mask.detach().max()) <= 1 + 1e-5
        assert float(mask.detach().mean()) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_choices_get_gradients_through_the_model(
    model: nn.Module, stacks, start, tokens: Tensor, relaxation: Relaxation
) -> None:
    shape = replace(SHAPE, relaxation=relaxation)
    orders = LearnableOrders(stacks, start, TWO_OF_FOUR, shape, torch.float32)
    orders.learn("order")
    with masked(model, orders.at(1.0, step=0).masks()):
        model(tokens, use_cache=False).logits.square().sum().backward()
    for bundle in orders.bundles:
        assert bool(torch.isfinite(bundle.choice.grad).all())
        assert float((bundle.choice.grad != 0).float().mean()) > 0.9


@pytest.mark.parametrize("what", get_args(Learns))
def test_orders_or_multipliers_learn_and_not_the_others(
    model: nn.Module, stacks, start, tokens: Tensor, what: Learns
) -> None:
    shape = replace(SHAPE, multipliers=True)
    orders = LearnableOrders(stacks, start, TWO_OF_FOUR, shape, torch.float32)
    orders.learn(what)
    with masked(model, orders.at(1.0, step=0).masks()):
        model(tokens, use_cache=False).logits.square().sum().backward()
    choices = [bundle.choice for bundle in orders.bundles]
    learned, others = choices, orders.log_multipliers()
    if what == "multipliers":
        learned, others = others, learned
    assert all(float(tensor.grad.norm()) > 0 for tensor in learned)
    assert all(tensor.grad is None for tensor in others)


def test_a_swap_uses_its_gradients_up(stacks, start, generator) -> None:
    """The next backward pass adds to zeros, where a captured graph finds them."""
    orders = LearnableOrders(stacks, start, TWO_OF_FOUR, SHAPE, torch.float32)
    grads = []
    for bundle in orders.bundles:
        bundle.choice.grad = torch.randn(bundle.choice.shape, generator=generator)
        grads.append(bundle.choice.grad)
    orders.swap(1.0)
    for bundle, grad in zip(orders.bundles, grads, strict=True):
        assert bundle.choice.grad is grad
        assert not bool(grad.any())
        assert not bool(bundle.choice.any())


@pytest.mark.parametrize(("share", "swaps"), [(0.0, 1), (0.5, 3), (1.0, 6)])
def test_so_many_blocks_of_a_shape_swap(
    stacks, start, generator, share: float, swaps: int
) -> None:
    hidden = {name: stacks[name] for name in ("hidden.0", "hidden.1")}
    orders = LearnableOrders(hidden, start, TWO_OF_FOUR, SHAPE, torch.float32)
    (bundle,) = orders.bundles
    before = bundle.column.clone()
    bundle.choice.grad = torch.randn(bundle.choice.shape, generator=generator)
    orders.swap(share)
    changed = (bundle.column != before).sum(1)
    assert changed.sort(descending=True).values.tolist() == [2] * swaps + [0] * (
        6 - swaps
    )


def test_costs_of_former_steps_count(stacks, start) -> None:
    """What two steps say outweighs what a third says against them."""
    value = {"value.0": stacks["value.0"]}
    orders = LearnableOrders(value, start, TWO_OF_FOUR, SHAPE, torch.float32)
    (bundle,) = orders.bundles
    before = bundle.column.clone()
    stay = nn.functional.one_hot(before, 2).float()  # costs more where it is
    for costs in (-stay, -stay, stay):
        bundle.choice.grad = costs
        orders.swap(1.0)
    assert torch.equal(bundle.column, before)


def test_fixed_spaces_keep_their_order(stacks, start, generator) -> None:
    fixed = ["residual", "hidden.0"]
    orders = LearnableOrders(
        stacks, start, TWO_OF_FOUR, SHAPE, torch.float32, fixed=fixed
    )
    _learn_anything(orders, generator)
    for name, perm in orders.perms().items():
        assert same_groups(perm, start[name], 4) == (name in fixed)


def test_spaces_of_one_shape_share_a_tensor_and_keep_their_own_order(
    stacks, start
) -> None:
    orders = LearnableOrders(stacks, start, TWO_OF_FOUR, SHAPE, torch.float32)
    # residual: 2 blocks of 16, hidden: 3 of 16 a layer; value: 2 heads of 8 a layer.
    shapes = {tuple(bundle.choice.shape) for bundle in orders.bundles}
    assert shapes == {(2, 16, 4), (6, 16, 4), (4, 8, 2)}
    alone = {
        name: LearnableOrders(
            {name: stack}, {name: start[name]}, TWO_OF_FOUR, SHAPE, torch.float32
        )
        .at(1.0, step=0)
        .masks()
        for name, stack in stacks.items()
    }
    together = orders.at(1.0, step=0).masks()
    for masks in alone.values():
        values = {name: _values(mask) for name, mask in masks.items()}
        assert values.keys() <= together.keys()
        for name, value in values.items():
            assert torch.equal(value, _values(together[name]))


@pytest.mark.parametrize("m", [2, 4, 8])
@pytest.mark.parametrize("segment", [8, 24, 48, 64])
@pytest.mark.parametrize("wanted", [8, 20, 64, 999])
def test_a_block_is_the_largest_that_fits(wanted: int, segment: int, m: int) -> None:
    fits = [
        s
        for s in range(1, segment + 1)
        if segment % s == 0 and s % m == 0 and s <= wanted
    ]
    assert OrderShape(block_size=wanted).size_in(segment, m) == max(fits)


@pytest.mark.parametrize(("groups", "size"), [(1, 48), (4, 12), (5, 8), (999, 4)])
def test_groups_cut_a_run_into_so_many_blocks_or_more(groups: int, size: int) -> None:
    assert OrderShape(groups=groups).size_in(48, 4) == size


def test_an_assignment_begun_before_the_logits_changed_is_not_used(
    stacks, start, generator: torch.Generator
) -> None:
    orders, fresh = (
        LearnableOrders(stacks, start, TWO_OF_FOUR, PLACES, torch.float32)
        for _ in range(2)
    )
    orders.assign()
    orders.perms()
    with torch.no_grad():
        for logits, same in zip(orders.logits(), fresh.logits(), strict=True):
            logits.normal_(generator=generator)
            same.copy_(logits)
    expected = fresh.perms()
    for name, perm in orders.perms().items():
        assert torch.equal(perm, expected[name])
        assert not same_groups(perm, start[name], 4)


@pytest.mark.parametrize("limit", [None, 7, 50])
def test_readers_share_the_sample_of_their_space(stacks, start, limit) -> None:
    shape = replace(SHAPE, row_limit=limit)
    orders = LearnableOrders(stacks, start, TWO_OF_FOUR, shape, torch.float32)
    masks = orders.at(1.0, step=2).masks()
    for stack in stacks.values():
        whole = RowSample.of_step(sum(stack.rows), limit, step=2)
        rows, first = [], 0
        for consumer, count in zip(stack.space.consumers, stack.rows, strict=True):
            sample = masks[consumer.name].sample
            of_reader = range(count)[sample.offset :: sample.stride]
            rows += [first + row for row in of_reader]
            first += count
        assert rows == list(range(first)[whole.offset :: whole.stride])


def test_an_assignment_can_be_begun_anew(stacks, start, monkeypatch) -> None:
    """What changes logits unseen, as a fused optimiser does, is followed by a call."""
    orders = LearnableOrders(stacks, start, TWO_OF_FOUR, PLACES, torch.float32)
    begun: list[Tensor] = []

    def count(benefit: Tensor):
        begun.append(benefit)
        return assign_later(benefit)

    monkeypatch.setattr("nm_permute_plugin.pruning.learn.bundles.assign_later", count)
    orders.perms()
    orders.at(1.0, step=0).masks()
    assert len(begun) == len(orders.bundles)
    orders.assign()
    orders.perms()
    assert len(begun) == 2 * len(orders.bundles)
