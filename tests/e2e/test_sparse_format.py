# SPDX-License-Identifier: Apache-2.0
"""A recipe that asks for the sparse format leaves it, and it loads to the same logits."""

import json
from pathlib import Path

import pytest
import torch
from helpers import modifier, ours, quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from nm_permute_plugin.cli.app import app
from nm_permute_plugin.modifiers import LearnablePermutationModifier

pytestmark = pytest.mark.slow


EIGHT_BIT = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}
OF_CACHE = modifier(
    "quantization", "QuantizationModifier", targets=[], kv_cache_scheme=EIGHT_BIT
)


@pytest.mark.parametrize(
    "more", ["", quantize("FP8_DYNAMIC"), OF_CACHE], ids=["bf16", "fp8", "fp8 cache"]
)
def test_sparse_and_dense_format_give_the_same_logits(
    tiny_checkpoint, run_oneshot, tokens, tmp_path: Path, more: str
) -> None:
    logits = {}
    for format in ("dense", "sparse-24-bitmask"):
        out = tmp_path / "out" / format
        run_oneshot(tiny_checkpoint(), ours(method="search", format=format) + more, out)
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        with torch.no_grad():
            logits[format] = model(tokens, use_cache=False).logits
    assert torch.equal(logits["dense"], logits["sparse-24-bitmask"])

    sparse = tmp_path / "out" / "sparse-24-bitmask"
    config = json.loads((sparse / "config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"
    names = load_file(sparse / "model.safetensors")
    assert sum(name.endswith(".compressed") for name in names) == 14
    assert [name for name in names if name.endswith("_proj.weight")] == []
    result = CliRunner().invoke(app, ["verify", str(sparse)])
    assert result.exit_code == 0, result.output


def test_the_command_converts_there_and_back(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_oneshot(
        tiny_checkpoint(), ours(method="search", format="sparse-24-bitmask"), out
    )
    back = tmp_path / "back"
    result = CliRunner().invoke(
        app, ["convert", str(out), str(back), "--format", "dense"]
    )
    assert result.exit_code == 0, result.output
    assert "stored dense, zeros included: converted" in (back / "README.md").read_text()
    again = tmp_path / "again"
    result = CliRunner().invoke(app, ["convert", str(back), str(again)])
    assert result.exit_code == 0, result.output
    first = load_file(out / "model.safetensors")
    second = load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert [n for n in first if not torch.equal(first[n], second[n])] == []


def test_a_damaged_checkpoint_is_reported_and_fails(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_oneshot(
        tiny_checkpoint(), ours(method="search", format="sparse-24-bitmask"), out
    )
    shard = out / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    result = CliRunner().invoke(app, ["verify", str(out)])
    assert result.exit_code == 1
    assert "model.safetensors" in result.output


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    arguments = ["convert", str(tmp_path), str(tmp_path / "x"), "--format", "marlin"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "sparse-24-bitmask" in result.output


def test_the_sparse_format_is_refused_for_other_patterns() -> None:
    with pytest.raises(ValueError, match="2:4 only, not 4:8"):
        LearnablePermutationModifier(mask_structure="4:8", format="sparse-24-bitmask")
