# SPDX-License-Identifier: Apache-2.0
"""Modes of the engine with a sparse checkpoint: what is said with its dense form."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(pruned, tmp_path_factory) -> Path:
    """A random LoRA adapter of the pruned model."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(pruned("bf16", "dense"), dtype="auto")
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ran(pruned, adapter: Path, run_engine, tmp_path_factory) -> tuple[dict, str]:
    """What engines say, one after the other in one process, and what they log."""
    out = tmp_path_factory.mktemp("modes") / "said.json"
    paths = [
        pruned(kind, format)
        for kind in ("bf16", "int8-cache")
        for format in ("dense", "sparse-24-bitmask")
    ]
    experts = pruned("qwen2-moe", "sparse-24-bitmask")
    done = run_engine("modes.py", out, adapter, *paths, experts)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text()), done.stdout + done.stderr


def test_lora_prefix_caching_and_chunked_prefill(ran) -> None:
    dense, sparse = ran[0]["shared"]
    assert sparse == dense
    without, adapted, again = sparse[:2], sparse[2:4], sparse[4:]
    assert adapted != without
    assert [tokens for tokens, _ in again] == [tokens for tokens, _ in without]


def test_a_cache_of_8_bits_and_a_sparse_draft_model(ran) -> None:
    dense, sparse = ran[0]["cached"]
    assert sparse == dense
    guessed, right = sparse[-1]
    assert right > guessed / 2  # by the same model before it was quantized
    assert dense[:-1] != ran[0]["wide"]  # a cache of 16 bits


def test_half_cpu_offload_and_guessed_tokens(ran) -> None:
    dense, sparse = ran[0]["half"]
    assert [tokens for tokens, _ in sparse] == [tokens for tokens, _ in dense]


def test_experts_whose_kernel_crashes_when_it_is_tried_are_left_to_vllm(
    ran, said
) -> None:
    found, log = ran
    expected = said["qwen2-moe-dense"]
    for key in ("tokens", "logprobs"):
        assert found["crashed"][key] == expected[key]
    warnings = [line for line in log.splitlines() if "illegal memory access" in line]
    assert len(warnings) == 1
    assert "4 of 20 2:4 layers are served dense" in warnings[0]
