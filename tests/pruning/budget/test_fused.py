# SPDX-License-Identifier: Apache-2.0
"""Linears that serving fuses are kept together: sparse all, or dense all."""

import pytest
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.budget.fused import fused_linears
from nm_permute_plugin.pruning.targets import match_linears
from nm_permute_plugin.specs.architectures import spec_of
from nm_permute_plugin.specs.spec import resolve

SIZE = {"hidden_size": 32, "vocab_size": 32, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def groups_of(model, ignore=("lm_head",)):
    linears = match_linears(model, ["Linear"], ignore)
    resolved = resolve(model, spec_of(model), NMPattern(2, 4), linears, 8)
    return fused_linears(model, resolved, linears)


def test_queries_keys_and_values_gate_and_up(tiny_model):
    model = tiny_model("llama")
    groups = groups_of(model)
    assert [str(group).removeprefix("model.layers.0.") for group in groups[:4]] == [
        "self_attn.{q_proj,k_proj,v_proj}",
        "self_attn.o_proj",
        "mlp.{gate_proj,up_proj}",
        "mlp.down_proj",
    ]
    assert [group.shape for group in groups[:4]] == [
        (64, 32),
        (32, 32),
        (96, 32),
        (32, 48),
    ]
    assert [group.weights for group in groups[:4]] == [2048, 1024, 3072, 1536]
    assert len(groups) == 8


def test_conv1d_counts_outputs_along_its_other_axis():
    config = GPT2Config(n_embd=32, n_head=4, n_layer=1, n_inner=64, vocab_size=32)
    groups = groups_of(GPT2LMHeadModel(config))
    assert [(str(g).rpartition(".")[2], g.shape) for g in groups] == [
        ("c_attn", (96, 32)),
        ("c_proj", (32, 32)),
        ("c_fc", (64, 32)),
        ("c_proj", (32, 64)),
    ]


def test_all_experts_of_a_layer_are_one_block():
    moe = pytest.importorskip("llmcompressor.modeling.moe.linearize")
    config = Qwen3MoeConfig(**SIZE, **HEADS, **EXPERTS, intermediate_size=16)
    model = moe.linearize_moe(Qwen3MoeForCausalLM(config))
    blocks = [g for g in groups_of(model, ["lm_head", "re:.*gate$"]) if g.shape is None]
    assert [str(block) for block in blocks] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]
    assert [len(block.linears) for block in blocks] == [9, 9]
