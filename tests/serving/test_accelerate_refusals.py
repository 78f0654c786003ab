# SPDX-License-Identifier: Apache-2.0
"""What ``accelerate`` leaves dense, or refuses, says so with the reason."""

import inspect
import re

import pytest
import torch
from accelerating import DTYPE, accelerated, bits, same
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import nm_permute_plugin as nmp


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("train", [False, True])
def test_training_is_refused_in_one_line(
    sparse_model, tokens: Tensor, train: bool
) -> None:
    model = nmp.accelerate(sparse_model()).train(train)
    loss = model(tokens, labels=tokens).loss
    with pytest.raises(RuntimeError, match="forward only: nmp.accelerate.*undo=True"):
        loss.backward()


@pytest.mark.usefixtures("kernels")
def test_keep_masks_and_prune_name_the_way_back(sparse_model, tokens: Tensor) -> None:
    model = nmp.accelerate(sparse_model())
    data = nmp.read_samples(model, [{"input_ids": tokens.repeat(9, 1)}])
    calls = (lambda: nmp.keep_masks(model), lambda: nmp.prune(model, data))
    for call in calls:
        with pytest.raises(ValueError, match=re.escape("accelerate(model, undo=True)")):
            call()


def test_a_cpu_changes_nothing_and_one_line_says_why(
    sparse_model, lines: list[str]
) -> None:
    model = sparse_model()
    before = bits(model)
    lines.clear()
    nmp.accelerate(model)
    assert lines == [
        "accelerate: 0 of 15 linears run on sparse kernels; dense stay 1 (lm_head: a "
        "weight that is not 2:4), 14 (from model.layers.0.self_attn.q_proj to "
        "model.layers.1.mlp.down_proj: it is on cpu; the sparse kernels need a CUDA device)"
    ]
    assert accelerated(model) == 0
    assert same(bits(model), before)


@pytest.mark.usefixtures("kernels")
def test_what_cannot_be_packed_stays_dense_and_is_counted(
    sparse_model, lines: list[str]
) -> None:
    model = sparse_model()
    first, second = model.model.layers
    first.mlp.up_proj.weight.data[0, :4] = 1
    first.mlp.gate_proj.weight.data[0, :4] = torch.tensor([1, 1, -0.0, 0])
    first.mlp.down_proj.weight.data.zero_()
    first.self_attn.k_proj.weight = first.self_attn.v_proj.weight
    first.self_attn.q_proj.forward = first.self_attn.q_proj.forward
    second.self_attn.o_proj._hf_hook = second.self_attn.o_proj.forward
    second.self_attn.k_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(32, 16)
    second.mlp.to(torch.float32)
    second.self_attn.q_proj.weight.data[0, :2] = torch.tensor([-0.0, 1])
    second.self_attn.q_proj.weight.data[0, 2:4] = 0
    nmp.accelerate(model)
    for told in (
        "2 of 15 linears run",
        "1 (model.layers.1.self_attn.o_proj: a model on several devices, or offloaded, by",
        "1 (model.layers.1.self_attn.k_proj: a NonDynamicallyQuantizableLinear, which is",
        "2 (from model.layers.0.mlp.up_proj to lm_head: a weight that is not 2:4)",
        "1 (model.layers.0.mlp.gate_proj: a weight with -0.0 (nm-permute convert DIR OUT",
        "1 (model.layers.0.mlp.down_proj: a weight of zeros alone)",
        "v_proj: a weight that another module shares)",
        "1 (model.layers.0.self_attn.q_proj: another forward than a linear's)",
        "3 (from model.layers.1.mlp.gate_proj to model.layers.1.mlp.down_proj: weights in "
        "torch.float32, load them with dtype=torch.bfloat16)",
        "1 (model.layers.1.self_attn.q_proj: values that packing would lose: -0.0",
    ):
        assert told in lines[-1]


@pytest.mark.usefixtures("kernels")
def test_experts_stay_dense_and_are_counted(lines: list[str]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**sizes, **more, num_key_value_heads=2, vocab_size=48)
    model = Qwen3MoeForCausalLM(config).to(DTYPE)
    for module in model.model.layers[0].self_attn.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.view(len(module.weight), -1, 4)[..., 2:] = 0
    nmp.accelerate(model)
    assert "4 of 7 linears run on sparse kernels" in lines[-1]
    experts = "model.layers.0.mlp.experts"
    told = f"2 (from {experts}.gate_up_proj to {experts}.down_proj: a stack of experts)"
    assert told in lines[-1]


def test_a_gpt2_is_refused_by_the_name_of_its_layers() -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=48)
    with pytest.raises(ValueError, match=r"4 \(from transformer.h.0.*: a Conv1D\)"):
        nmp.accelerate(GPT2LMHeadModel(config).to(DTYPE))


def test_a_model_that_is_not_sparse_is_refused(tiny_model) -> None:
    with pytest.raises(
        ValueError, match=r"no linear of this LlamaForCausalLM has a 2:4"
    ):
        nmp.accelerate(tiny_model("llama", dtype=DTYPE))


def test_another_mode_is_refused(sparse_model) -> None:
    unchecked = inspect.unwrap(nmp.accelerate)
    with pytest.raises(ValueError, match="mode is 'fast'; it must be one of auto, mem"):
        unchecked(sparse_model(), mode="fast")


def test_a_name_is_no_model() -> None:
    # the tests check the types of arguments before our own check can
    unchecked = inspect.unwrap(nmp.accelerate)
    with pytest.raises(TypeError, match="takes a loaded model, got a str"):
        unchecked("MODEL-2of4")
