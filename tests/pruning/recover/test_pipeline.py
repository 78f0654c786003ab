# SPDX-License-Identifier: Apache-2.0
"""The recovery inside of a whole run: same permutations and masks, a smaller loss."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from whole_runs import assert_same, linears, weights_of

from nm_permute_plugin.pruning.data import Data, split_text
from nm_permute_plugin.pruning.settings import RecoverStage

STAGES = get_args(RecoverStage)
RECOVER = {
    "recover": {
        "stages": STAGES,
        "blocks": {"epochs": 2, "rate": 0.03},
        "end_to_end": {"steps": 8, "rate": 0.01},
    },
    "validation": {"every": 4},
}


@pytest.fixture
def data(chain_rows) -> Data:
    return split_text(list(chain_rows(30, 24, seed=1)), 4, validation_share=0.2, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_recovery_changes_kept_weights_of_the_same_masks(
    trained_checkpoint, go, assert_exactly, dtype: torch.dtype
) -> None:
    frozen, recovered = (
        AutoModelForCausalLM.from_pretrained(trained_checkpoint, dtype=dtype)
        for _ in range(2)
    )
    plain = go(frozen)
    record = go(recovered, **RECOVER)
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

    before = weights_of(model)
    go(model, method="identity", options={"write": write}, **RECOVER)
    assert_same(weights_of(model), before)
    assert {f"{name}.weight" for name in linears(model)} < set(written)
    assert "model.layers.0.self_attn.q_proj.bias" in written


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_model_is_recovered_alike(
    tiny_model, go, offload_to, tmp_path: Path, place: str
) -> None:
    offload = pytest.importorskip("compressed_tensors.offload")
    model, offloaded = tiny_model("llama"), tiny_model("llama")
    go(model, method="identity", **RECOVER)
    offload_to(offloaded, place, tmp_path)
    with offload.disable_offloading():
        options = {"write": offload.update_offload_parameter}
        go(offloaded, method="identity", options=options, **RECOVER)
    assert_same(weights_of(offloaded), weights_of(model))


def test_a_linear_that_is_in_no_layer_is_refused_before_anything_is_done(
    tiny_model, go
) -> None:
    model = tiny_model("llama")
    before = weights_of(model)
    options = {"prunable": [*linears(model), "lm_head"]}
    with pytest.raises(ValueError, match="lm_head stands outside of model.layers"):
        go(model, options=options, recover=["rescale", "blocks"])
    assert_same(weights_of(model), before)
