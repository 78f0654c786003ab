# SPDX-License-Identifier: Apache-2.0
"""All of the model's folder travels into its checkpoint, or is refused by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ours
from loguru import logger
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import nm_permute_plugin as nmp
from nm_permute_plugin.checkpoint.directory import open_checkpoint
from nm_permute_plugin.checkpoint.record import read_record
from nm_permute_plugin.checkpoint.verify import verify

pytestmark = pytest.mark.slow

SEARCH = ours(method="search", search={"rounds": 2})
HIDDEN = ours(method="search", search={"rounds": 2}, spaces=["hidden", "value"])
CARD = """---
license: llama3.2
license_link: https://example.org/license
language:
- en
- de
tags:
- chat
base_model: some/base
extra_gated_prompt: agree
---
# Theirs
"""
TRAVELS = {
    "LICENSE": "mine",
    "preprocessor_config.json": "{}",
    "tokenizer.model": "pieces",
    "special_notes.json": "[1]",
    "assets/deep/words.txt": "words",
}
STAYS = {
    "pytorch_model.bin": "dense",
    "consolidated.00.pth": "dense",
    "model.fp16.safetensors": "dense",
    "adapter_config.json": "{}",
    "original/params.json": "{}",
    "original/consolidated.safetensors": "dense",
    "onnx/model.onnx": "dense",
    "onnx/model.onnx_data": "dense",
    ".git/config": "secret",
    ".cache/huggingface/lock": "",
}

Adapt = Callable[..., Path]


@pytest.fixture
def folder(tiny_checkpoint) -> Path:
    """The folder of a model with all that such folders hold."""
    made = tiny_checkpoint()
    for name, content in {**TRAVELS, **STAYS, "README.md": CARD}.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(content)
    return made


def files(out: Path) -> dict[str, bytes]:
    found = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def assert_travelled(out: Path) -> None:
    found = files(out)
    assert {name: found[name].decode() for name in TRAVELS} == TRAVELS
    assert [name for name in STAYS if name in found] == []
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_files_that_are_no_weights_travel(
    folder: Path, run_oneshot, tmp_path: Path
) -> None:
    out, told = tmp_path / "out", []
    sink = logger.add(told.append, format="{message}")
    run_oneshot(folder, SEARCH, out)
    logger.remove(sink)
    assert_travelled(out)
    assert verify(out).good
    said = next(line for line in told if "these do not travel" in line)
    for name in ("pytorch_model.bin", "original/", "onnx/", "model.fp16.safetensors"):
        assert name in said
    # What we and the host write is not the source's.
    assert "# dense, 2:4 sparse" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text()) != {}
    AutoTokenizer.from_pretrained(out)
