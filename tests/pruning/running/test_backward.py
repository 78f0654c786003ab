# SPDX-License-Identifier: Apache-2.0
"""A step in parts, or with layers run again in backward, has the gradients of the whole."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.learn.loop import frozen
from nm_permute_plugin.pruning.learn.order_shape import Learns, OrderShape
from nm_permute_plugin.pruning.learn.orders import LearnableOrders
from nm_permute_plugin.pruning.running.backward import (
    BackwardStep,
    activation_bytes,
    layers_to_checkpoint,
)
from nm_permute_plugin.pruning.running.loss import LossWeights
from nm_permute_plugin.pruning.running.memory import (
    checkpointed,
    free_bytes,
    kept_bytes,
    repeated_layers,
)
from nm_permute_plugin.pruning.stacking import StackedScore

DOWN = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
WEIGHTS = LossWeights(divergence=1.0, hidden=0.5)


@pytest.fixture
def model(tiny_model) -> nn.Module:
    return tiny_model("llama")


@pytest.fixture
def orders(model: nn.Module, resolve_model) -> LearnableOrders:
    scores = {
        name: module.weight.detach().abs()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    spaces = resolve_model(model).spaces
    stacks = {name: StackedScore.of(space, scores) for name, space in spaces.items()}
    start = {name: torch.arange(space.size) for name, space in spaces.items()}
    shape = OrderShape(block_size=16, multipliers=True)
    return LearnableOrders(stacks, start, NMPattern(2, 4), shape, torch.float32)


@pytest.fixture(params=get_args(Learns))
def learned(request, orders: LearnableOrders) -> list[Tensor]:
    """What has gradients, the orders' or the multipliers'."""
    orders.learn(request.param)
    if request.param == "order":
        return [bundle.choice for bundle in orders.bundles]
    return list(orders.log_multipliers())


@pytest.fixture
def gradients(
    model: nn.Module, orders: LearnableOrders, learned: list[Tensor]
) -> Callable[..., tuple[float, list[Tensor]]]:
    """A factory: the loss of a step and the gradients that it leaves."""

    def step(batch: dict[str, Tensor], **options) -> tuple[float, list[Tensor]]:
        with frozen(model), torch.enable_grad():
            step = BackwardStep(model, orders.masks, WEIGHTS, **options)
            value = step(batch, lambda: orders.at(0.5, step=0))
        found = []
        for parameter in learned:
            found.append(parameter.grad.clone())
            parameter.grad = None
        return value, found

    return step


@pytest.fixture(params=["whole", "padded"])
def batch(request, tokens: Tensor) -> dict[str, Tensor]:
    """Three rows of twelve tokens, or of twelve, seven and twelve."""
    if request.param == "whole":
        return {"input_ids": tokens}
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_parts_add_up_to_the_batch(gradients, batch, size: int) -> None:
    value, whole = gradients(batch)
    in_parts, parts = gradients(batch, micro_batch_size=size)
    assert in_parts == pytest.approx(value, rel=1e-5)
    for found, expected in zip(parts, whole, strict=True):
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_layers_that_run_again_leave_the_same_gradients(
    model: nn.Module, gradients, batch
) -> None:
    value, plain = gradients(batch)
    runs: list[nn.Module] = []
    layers = repeated_layers(model, DOWN)
    for layer in layers:
        layer.input_layernorm.register_forward_hook(
            lambda module, *rest: runs.append(module)
        )
    again, checkpointed = gradients(batch, layers=layers)
    assert again == value
    for found, expected in zip(checkpointed, plain, strict=True):
        assert torch.equal(found, expected)
    # The dense model once, the pruned one forward and again in backward.
    assert len(runs) == 3 * len(layers)
    assert [m for m in model.modules() if "forward" in m.__dict__] == []


def test_layers_that_run_again_keep_less(
    model: nn.Module, orders: LearnableOrders, tokens: Tensor
) -> None:
    def bytes_of(rows: int) -> int:
        ids = {"input_ids": tokens[:1].repeat(rows, 4)}
        with frozen(model):
            return activation_bytes(
                model, lambda: orders.at(1.0, 0).masks(), ids, WEIGHTS
            )

    whole = bytes_of(4)
    with checkpointed(repeated_layers(model, DOWN)):
        less = bytes_of(4)
    assert 0 < less < whole / 2
    assert whole == pytest.approx(4 * bytes_of(1), rel=0.01)


def test_what_a_pass_keeps_is_counted_once_and_without_parameters() -> None:
    layer = nn.Linear(8, 8)
    x = torch.randn(5, 8, requires_grad=True)

    def forward() -> Tensor:
        middle = layer(x)  # keeps x and the weight
        return (middle * middle).sum()  # keeps the same tensor twice

    assert kept_bytes(layer, forward) == 2 * 5 * 8 * 4


@pytest.mark.parametrize(("wanted", "count"), [(True, 2), (False, 0)])
def test_who_says_so_gets_all_layers_or_none(
    model: nn.Module, tokens: Tensor, wanted: bool, count: int
) -> None:
    def no_masks() -> dict[str, Tensor]:
        raise AssertionError("nothing needs to be tried")

    batch = {"input_ids": tokens}
    found = layers_to_checkpoint(model, DOWN, no_masks, batch, WEIGHTS, wanted=wanted)
    assert found == list(model.model.layers)[:count]


@pytest.mark.parametrize(("free", "count"), [(None, 0), (1 << 40, 0), (1000, 2)])
def test_layers_run_again_where_memory_is_short(
    model: nn.Module,
    orders: LearnableOrders,
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    count: int,
) -> None:
    monkeypatch.setattr(
        "nm_permute_plugin.pruning.running.backward.free_bytes", lambda device: free
    )
    with frozen(model):
        found = layers_to_checkpoint(
            model,
            DOWN,
            lambda: orders.at(1.0, 0).masks(),
            {"input_ids": tokens},
            WEIGHTS,
        )
    assert len(found) == count


def test_only_a_gpu_says_how_much_is_free() -> None:
    assert free_bytes(torch.device("cpu")) is None


def test_lists_without_the_linears_and_lists_inside_of_lists_are_left_out() -> None:
    def layer() -> nn.ModuleDict:
        experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        return nn.ModuleDict({"experts": experts})

    model = nn.ModuleDict(
        {"other": nn.ModuleList([layer()]), "layers": nn.ModuleList([layer(), layer()])}
    )
    assert repeated_layers(model, ["layers.1.experts.0"]) == list(model["layers"])
