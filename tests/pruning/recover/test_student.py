# SPDX-License-Identifier: Apache-2.0
"""Kept weights: the dense model stays, zeros stay, steps have the weights' size."""

import pytest
import torch
from torch import Tensor, nn

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.recover.student import (
    KeptWeights,
    Optimizer,
    endless,
)
from nm_permute_plugin.pruning.running.loss import LossWeights
from nm_permute_plugin.specs.fold import write_in_place

MIXED = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")


def magnitude_masks(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {
        name: nm_mask(
            model.get_submodule(name).weight.detach().abs().float(), NMPattern(2, 4)
        )
        for name in names
    }


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.fixture
def model(tiny_model) -> nn.Module:
    return tiny_model("qwen2")  # k_proj has a bias, down_proj has none


@pytest.fixture
def kept(model) -> KeptWeights:
    return KeptWeights(model, magnitude_masks(model, MIXED))


def test_the_values_are_weights_and_biases(kept: KeptWeights) -> None:
    k, down = MIXED
    assert set(kept.values) == {f"{k}.weight", f"{k}.bias", f"{down}.weight"}
    assert kept.linears == MIXED


def test_the_pruned_model_runs_beside_the_dense_one(
    model, kept: KeptWeights, tokens
) -> None:
    dense = logits_of(model, tokens)
    with kept.running():
        beside = logits_of(model, tokens)
    assert not torch.equal(beside, dense)
    assert torch.equal(logits_of(model, tokens), dense)
    kept.write(write_in_place)
    assert torch.equal(logits_of(model, tokens), beside)


def test_values_put_in_go_before_and_count_as_zero_where_dropped(
    model, kept: KeptWeights, tokens
) -> None:
    k, down = MIXED
    with kept.running():
        pruned = logits_of(model, tokens)
    dense_weight = {f"{down}.weight": model.get_submodule(down).weight.detach()}
    with kept.running(dense_weight):
        assert torch.equal(logits_of(model, tokens), pruned)
    bias = {f"{k}.bias": kept.values[f"{k}.bias"] + 1}
    with kept.running(bias):
        assert not torch.equal(logits_of(model, tokens), pruned)


def test_gradients_reach_what_is_kept_and_nothing_else(
    model, kept: KeptWeights, tokens
) -> None:
    masters = kept.masters(MIXED)
    with kept.running(masters):
        model(tokens, use_cache=False).logits.square().mean().backward()
    for name in MIXED:
        dropped = kept.values[f"{name}.weight"] == 0
        assert bool((masters[f"{name}.weight"].grad[dropped] == 0).all())
        assert bool((masters[f"{name}.weight"].grad[~dropped] != 0).all())
    assert bool((masters[f"{MIXED[0]}.bias"].grad != 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rounding_keeps_the_dtype_and_writes_no_negative_zero(
    tiny_model, dtype: torch.dtype
) -> None:
    model = tiny_model("llama", dtype=dtype)
    kept = KeptWeights(model, magnitude_masks(model, MIXED))
    masters = {name: -value.float() - 0.1 for name, value in kept.values.items()}
    rounded = kept.rounded(masters)
    for name, value in rounded.items():
        dropped = kept.values[name] == 0
        assert value.dtype == dtype
        assert torch.equal(value == 0, dropped)
        assert not bool(torch.signbit(value[dropped]).any())
        assert torch.equal(value[~dropped], masters[name][~dropped].to(dtype))


def test_masters_are_copies(kept: KeptWeights) -> None:
    before = {name: value.clone() for name, value in kept.values.items()}
    with torch.no_grad():
        for master in kept.masters(MIXED).values():
            master.add_(1)
    assert [n for n in before if not torch.equal(before[n], kept.values[n])] == []


def test_a_write_goes_through_the_callback(model, kept: KeptWeights) -> None:
    before = weights_of(model)
    written = []
    kept.write(lambda owner, leaf, value: written.append((owner, leaf, value.shape)))
    k, down = map(model.get_submodule, MIXED)
    assert [(owner, leaf) for owner, leaf, _ in written] == [
        (k, "weight"),
        (k, "bias"),
        (down, "weight"),
    ]
    after = weights_of(model)
    assert [n for n in before if not torch.equal(before[n], after[n])] == []


def test_the_loss_of_a_mask_that_drops_nothing_is_zero(model, tokens) -> None:
    masks = {MIXED[0]: torch.ones(16, 32, dtype=torch.bool)}
    loss = KeptWeights(model, masks).mean_loss([{"input_ids": tokens}], LossWeights())
    assert abs(loss) < 1e-6


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_step_has_the_size_of_the_weights(scale: float) -> None:
    weight = scale * torch.tensor([[3.0, 0.0, -4.0, 0.0]])
    master = weight.clone().requires_grad_(True)
    optimizer = Optimizer({"weight": master}, rate=0.01, steps=9)
    (scale**-1 * master).sum().backward()
    optimizer.step()
    rms = scale * (25 / 2) ** 0.5
    torch.testing.assert_close(
        weight - master.detach(), torch.full((1, 4), 0.01 * rms), rtol=1e-3, atol=0.0
    )
    assert not bool(master.grad.any())


@pytest.mark.parametrize("steps", [3, 40])
def test_steps_rise_for_a_tenth_and_fall_to_nothing(steps: int) -> None:
    master = torch.ones(1, 4, requires_grad=True)
    optimizer = Optimizer({"weight": master}, rate=0.1, steps=steps)
    moved = []
    for _ in range(steps + 1):
        before = master.detach().clone()
        master.sum().backward()
        optimizer.step()
        moved.append(float((before - master.detach()).mean()))
    peak = steps // 10
    assert moved.index(max(moved)) == peak
    assert moved == sorted(moved[:peak]) + sorted(moved[peak:], reverse=True)
    assert moved[0] == pytest.approx(0.1 / (peak + 1), rel=1e-3)
    assert moved[-2] > moved[-1] == 0


def test_a_parameter_of_zeros_stays() -> None:
    master = torch.zeros(3, requires_grad=True)
    optimizer = Optimizer({"bias": master}, rate=0.1, steps=2)
    master.sum().backward()
    optimizer.step()
    assert torch.equal(master.detach(), torch.zeros(3))


def test_every_number_comes_once_an_epoch() -> None:
    numbers = endless(5, seed=3)
    epochs = [[next(numbers) for _ in range(5)] for _ in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(5))] * 4
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = endless(5, seed=3)
    assert [[next(again) for _ in range(5)] for _ in range(4)] == epochs
