# SPDX-License-Identifier: Apache-2.0
"""Rebuilding layers regains what was lost, never loses on validation rows, and repeats."""

from dataclasses import replace

import pytest
import torch
from recovery import differing, kept_of, planted, values_of
from transformers import AutoModelForCausalLM

from nm_permute_plugin.pruning.recover.blocks import (
    BlockSettings,
    rebuild_blocks,
    relative_error,
)
from nm_permute_plugin.pruning.running.loss import LossWeights
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.text import split_text

SETTINGS = BlockSettings(epochs=6, rate=0.05)


@pytest.fixture
def text(chain_rows) -> Samples:
    return split_text(list(chain_rows(40, 24, seed=1)), 4, validation=0.2, seed=0)


def test_the_error_is_relative_to_each_token_and_skips_padding() -> None:
    theirs = torch.tensor([[[3.0, 4.0], [0.0, 1000.0], [9.0, 9.0]]])
    ours = torch.tensor([[[3.0, 3.0], [0.0, 500.0], [0.0, 0.0]]])
    counted = torch.tensor([[True, True, False]])
    error = float(relative_error(ours, theirs, counted))
    assert error == pytest.approx((1 / 25 + 1 / 4) / 2)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_most_of_a_planted_loss_is_regained(
    tiny_model, text: Samples, window: int, architecture: str
) -> None:
    kept = planted(tiny_model(architecture))
    values, looks = rebuild_blocks(kept, text, replace(SETTINGS, window=window))
    assert [look["layer"] for look in looks] == list(range(0, 2, window))
    assert looks[-1]["after"] < 0.5 * looks[-1]["before"]
    weights = LossWeights()
    lost = kept.mean_loss(text.validation, weights)
    left = kept.mean_loss(text.validation, weights, values)
    assert left < 0.5 * lost


def test_a_later_layer_corrects_the_errors_of_an_earlier_one(
    tiny_model, text: Samples
) -> None:
    model = tiny_model("llama")
    kept = kept_of(model, only="layers.1.")
    with torch.no_grad():
        for name, value in kept.values.items():
            model.get_parameter(name).copy_(value)  # layer 1 loses nothing by its masks
    kept = kept_of(model, only="down_proj")
    kept.values["model.layers.0.mlp.down_proj.weight"].zero_()  # what is 0 stays 0
    _, (first, second) = rebuild_blocks(kept, text, SETTINGS)
    assert first["before"] == first["after"] > 0.01
    assert second["after"] < 0.9 * second["before"]


@pytest.mark.parametrize("rate", [0.01, 50.0], ids=["good", "far too high"])
def test_no_window_is_worse_on_validation_rows(
    trained_checkpoint, text: Samples, rate: float
) -> None:
    kept = kept_of(AutoModelForCausalLM.from_pretrained(trained_checkpoint))
    values, looks = rebuild_blocks(kept, text, replace(SETTINGS, rate=rate))
    assert all(look["after"] <= look["before"] for look in looks)
    better = [look["layer"] for look in looks if look["after"] < look["before"]]
    changed = {int(name.split(".")[2]) for name in values}
    assert changed == set(better)
    assert better == ([0, 1] if rate == 0.01 else [])


def test_the_kept_weights_change_only_when_taken(tiny_model, text: Samples) -> None:
    model = tiny_model("llama")
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = kept_of(model)
    before = values_of(kept)
    values, _ = rebuild_blocks(kept, text, SETTINGS)
    assert differing(before, kept.values) == []
    assert differing(before, {**before, **values}) != []
    now = {name: p.detach() for name, p in model.named_parameters()}
    assert differing(dense, now) == []
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zeros_stay_and_the_seed_decides(
    tiny_model, text: Samples, dtype: torch.dtype
) -> None:
    runs = []
    for seed in (1, 1, 2):
        kept = kept_of(tiny_model("llama", dtype=dtype))
        values, looks = rebuild_blocks(kept, text, replace(SETTINGS, seed=seed))
        assert looks[0]["after"] < looks[0]["before"]
        for name, value in values.items():
            assert value.dtype == dtype
            assert torch.equal(value == 0, kept.values[name] == 0)
        runs.append(values)
    first, again, other = runs
    assert differing(first, again) == []
    assert differing(first, other) != []


def test_padding_is_not_learned_from(tiny_model, chain_rows) -> None:
    rows = chain_rows(12, 24, seed=1)
    short = Samples([{"input_ids": rows[:8, :16]}], [{"input_ids": rows[8:, :16]}])
    mask = torch.ones_like(rows)
    mask[:, 16:] = 0
    padded = Samples(
        [{"input_ids": rows[:8], "attention_mask": mask[:8]}],
        [{"input_ids": rows[8:], "attention_mask": mask[8:]}],
    )
    runs = [
        rebuild_blocks(kept_of(tiny_model("llama")), text, SETTINGS)[1]
        for text in (short, padded)
    ]
    for first, second in zip(*runs, strict=True):
        assert first == pytest.approx(second, rel=1e-3)


def test_layers_without_pruned_linears_are_passed_through(
    tiny_model, text: Samples
) -> None:
    kept = kept_of(tiny_model("llama"), only="layers.1.mlp")
    values, looks = rebuild_blocks(kept, text, SETTINGS)
    assert looks[0] == {"layer": 0, "before": 0.0, "after": 0.0}
    assert looks[1]["after"] < looks[1]["before"]
    assert all("layers.1.mlp" in name for name in values)


def test_activations_that_are_not_finite_are_refused(tiny_model, text: Samples) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the validation error of the recovery is nan"):
        rebuild_blocks(kept_of(model, only="layers.0."), text, SETTINGS)
