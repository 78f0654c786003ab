# SPDX-License-Identifier: Apache-2.0
"""Recovery sees weights as the quantization that follows in the recipe will round them."""

from pathlib import Path

import pytest
import torch
from helpers import modifier, ours, quantize
from llmcompressor.recipe import Recipe
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import nm_permute_plugin.modifiers  # noqa: F401
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.maths.kl import divergence
from nm_permute_plugin.modifiers import permutation
from nm_permute_plugin.modifiers.rounding import roundings_of

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
SMOOTH = modifier("smoothing", "SmoothQuantModifier", smoothing_strength=0.5)
MSE = {"observer": "memoryless_mse"}


def grouped(bits: int, **weights: object) -> str:
    given = {"num_bits": bits, "strategy": "group", "group_size": 16} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": given}}
    fields = {"config_groups": groups, "ignore": ["lm_head"]}
    return modifier("quantization", "QuantizationModifier", **fields)


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    "following",
    [
        grouped(4),
        grouped(4, symmetric=False),
        grouped(4, **MSE),
        quantize("W8A16"),
    ],
    ids=["4 bits", "with a zero point", "mse", "8 bits a channel"],
)
def test_weights_are_rounded_as_they_are_served(
    tiny_checkpoint, run_oneshot, tokens, tmp_path: Path, following: str
) -> None:
    recipe = ours(method="identity")
    run_oneshot(tiny_checkpoint(**WIDE), recipe, tmp_path / "pruned")
    run_oneshot(tmp_path / "dense", recipe + following, tmp_path / "served")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    modifiers = Recipe.create_instance(recipe + following).modifiers
    for name, rounding in roundings_of(modifiers[0], modifiers, pruned).items():
        weight = pruned.get_submodule(name).weight
        rounded = rounding(weight.detach())
        assert bool((rounded[weight == 0] == 0).all())
        assert not torch.equal(rounded, weight)
        with torch.no_grad():
            weight.copy_(rounded)
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served", dtype="auto")
    found, expected = logits_of(pruned, tokens), logits_of(served, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("following", "count"),
    [
        (quantize("W8A8"), 14),
        (quantize("W8A8", ignore=["lm_head", "re:.*down_proj"]), 12),
        (quantize("W8A8", targets=["re:.*up_proj"]), 2),
        ("", 0),
        (quantize("W8A8", "GPTQModifier"), 0),
        (SMOOTH + quantize("W8A8"), 0),
    ],
    ids=["all", "ignored", "targets", "none", "GPTQ", "smoothed before"],
)
def test_only_what_is_rounded_to_the_nearest_is_known_before(
    tiny_model, following: str, count: int
) -> None:
    model = tiny_model("llama")
    modifiers = Recipe.create_instance(ours(method="identity") + following).modifiers
    assert len(roundings_of(modifiers[0], modifiers, model)) == count


def test_a_recovery_before_quantization_loses_less_once_it_is_served(
    trained_checkpoint, run_oneshot, chain_rows, tmp_path: Path, monkeypatch
) -> None:
    training = {"stages": ["end_to_end"], "end_to_end": {"steps": 60, "rate": 0.02}}
    recipe = ours(method="identity", recover=training, batch_size=8) + grouped(3)
    rows = chain_rows(40, 32, seed=5).tolist()
    tokens = chain_rows(32, 32, seed=777)
    dense = AutoModelForCausalLM.from_pretrained(trained_checkpoint)
    losses = []
    for name in ("under rounding", "without"):
        run_oneshot(trained_checkpoint, recipe, tmp_path / name, rows)
        assert verify(tmp_path / name).good
        served = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        logits = (logits_of(model, tokens) for model in (served, dense))
        losses.append(float(divergence(*logits, torch.ones_like(tokens).bool())))
        monkeypatch.setattr(permutation, "roundings_of", lambda *_: {})
    assert losses[0] < 0.9 * losses[1]
