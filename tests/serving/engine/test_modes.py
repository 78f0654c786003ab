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
def said(pruned, adapter: Path, run_engine, tmp_path_factory) -> dict:
    """What engines say, one after the other in one process."""
    out = tmp_path_factory.mktemp("modes") / "said.json"
    paths = [pruned("bf16", format) for format in ("dense", "sparse-24-bitmask")]
    done = run_engine("modes.py", out, adapter, *paths)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_lora_prefix_caching_and_chunked_prefill(said: dict) -> None:
    dense, sparse = said["shared"]
    assert sparse == dense
    without, adapted, again = sparse[:2], sparse[2:4], sparse[4:]
    assert adapted != without
    assert [tokens for tokens, _ in again] == [tokens for tokens, _ in without]


def test_half_cpu_offload_and_guessed_tokens(said: dict) -> None:
    dense, sparse = said["half"]
    assert [tokens for tokens, _ in sparse] == [tokens for tokens, _ in dense]
