# SPDX-License-Identifier: Apache-2.0
"""The recovery inside of the whole way: same order and masks, better on validation text."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.text import split_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.pipeline import (
    OrderSettings,
    Record,
    permute_and_prune,
)
from nm_permute_plugin.pruning.recover.blocks import BlockSettings
from nm_permute_plugin.pruning.recover.distill import DistillSettings
from nm_permute_plugin.pruning.recover.stages import RecoverSettings, Stage

STAGES = get_args(Stage)
FROZEN = OrderSettings(NMPattern(2, 4), method="search")
RECOVER = RecoverSettings(
    stages=STAGES,
    blocks=BlockSettings(epochs=2, rate=0.03),
    distill=DistillSettings(steps=8, rate=0.01, evaluate_every=4),
)


def linears(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.fixture
def text(chain_rows) -> Samples:
    return split_text(list(chain_rows(30, 24, seed=1)), 4, validation=0.2, seed=0)


@pytest.fixture
def go(resolve_model, text):
    """A factory: ``go(model, settings)`` is the record of a whole run."""

    def run(model: nn.Module, settings: OrderSettings, **options) -> Record:
        names = options.pop("prunable", linears(model))
        resolved = resolve_model(model, names)
        return permute_and_prune(model, resolved, names, text, settings, **options)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_recovery_changes_kept_weights_of_the_same_order_and_masks(
    trained_checkpoint, go, assert_exactly, dtype: torch.dtype
) -> None:
    frozen, recovered = (
        AutoModelForCausalLM.from_pretrained(trained_checkpoint, dtype=dtype)
        for _ in range(2)
    )
    plain = go(frozen, FROZEN)
    record = go(recovered, replace(FROZEN, recover=RECOVER))
    assert_exactly(recovered)
    for space, perm in plain.perms.items():
        assert torch.equal(record.perms[space], perm)
    before, after = weights_of(frozen), weights_of(recovered)
    pruned = {f"{name}.weight" for name in linears(frozen)}
    assert {n for n in before if not torch.equal(before[n], after[n])} == pruned
    for name in pruned:
        assert torch.equal(after[name] == 0, before[name] == 0)
    assert plain.recovered == []
    assert "recover" not in plain.seconds
    assert list(record.seconds)[-2:] == ["recover", "prune"]
    assert [stage.stage for stage in record.recovered] == list(STAGES)
    assert record.recovered[-1].validation[1] < 0.8 * record.recovered[0].validation[0]


def test_weights_are_written_by_the_callback_alone(tiny_model, go) -> None:
    model = tiny_model("qwen2")
    written: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}

    def write(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
        written[f"{names[owner]}.{leaf}"] = tensor

    settings = replace(FROZEN, method="identity", recover=RECOVER)
    before = weights_of(model)
    go(model, settings, write=write)
    after = weights_of(model)
    assert [n for n in before if not torch.equal(before[n], after[n])] == []
    assert {f"{name}.weight" for name in linears(model)} < set(written)
    assert "model.layers.0.self_attn.q_proj.bias" in written


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_model_is_recovered_alike(
    tiny_model, go, offload_to, tmp_path: Path, place: str
) -> None:
    offload = pytest.importorskip("compressed_tensors.offload")
    settings = replace(FROZEN, method="identity", recover=RECOVER)
    model, offloaded = tiny_model("llama"), tiny_model("llama")
    go(model, settings)
    offload_to(offloaded, place, tmp_path)
    with offload.disable_offloading():
        go(offloaded, settings, write=offload.update_offload_parameter)
    before, after = weights_of(model), weights_of(offloaded)
    assert [n for n in before if not torch.equal(before[n], after[n])] == []


def test_a_linear_that_is_in_no_layer_is_refused_before_anything_is_done(
    tiny_model, go
) -> None:
    model = tiny_model("llama")
    before = weights_of(model)
    names = [*linears(model), "lm_head"]
    settings = replace(FROZEN, recover=replace(RECOVER, stages=("rescale", "blocks")))
    with pytest.raises(ValueError, match="lm_head stands outside of model.layers"):
        go(model, settings, prunable=names)
    after = weights_of(model)
    assert [n for n in before if not torch.equal(before[n], after[n])] == []
