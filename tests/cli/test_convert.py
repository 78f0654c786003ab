# SPDX-License-Identifier: Apache-2.0
"""``nm-permute convert`` says what it leaves dense, why, and what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nm_permute_plugin.cli.app import app

EXPERT = "model.layers.0.mlp.experts.{}.up_proj"
Q = "model.layers.0.self_attn.q_proj"
TWO_FOUR = torch.tensor([1.0, 0.0, 2.0, 0.0]).repeat(8, 2).bfloat16()

Checkpoint = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A factory: ``checkpoint(config, **tensors)`` is the folder of a checkpoint."""

    def make(config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
        path = tmp_path / "source"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path

    return make


def convert(source: Path, *options: str) -> tuple[list[str], set[str]]:
    """The lines that are printed, and the names of the tensors that are written."""
    out = source.parent / f"out{len(list(source.parent.iterdir()))}"
    result = CliRunner().invoke(app, ["convert", str(source), str(out), *options])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines(), set(load_file(out / "model.safetensors"))


@pytest.mark.parametrize("along", ["inputs", "outputs"])
def test_a_conv1d_stays_dense_whatever_its_zeros(
    checkpoint: Checkpoint, along: str
) -> None:
    weight = TWO_FOUR if along == "outputs" else TWO_FOUR.t().contiguous()
    names = {f"transformer.h.0.{name}" for name in ("attn.c_attn", "mlp.c_proj")}
    tensors = {f"{name}.weight": weight.clone() for name in names}
    lines, written = convert(checkpoint({"model_type": "gpt2"}, tensors))
    for name in names:
        said = "Conv1D stores [in, out], and sparse formats hold [out, in]"
        assert f"dense: {name}: {said}" in lines
    assert lines[-1].startswith("no matrix is stored as sparse-24-bitmask, for the ")
    assert written == set(tensors)


def mixture() -> dict[str, torch.Tensor]:
    """A linear of attention and two routed experts, all 2:4."""
    names = [Q, EXPERT.format(0), EXPERT.format(1)]
    return {f"{name}.weight": TWO_FOUR.clone() for name in names}


def test_sparse_experts_are_told_and_can_be_left_dense(
    checkpoint: Checkpoint,
) -> None:
    source = checkpoint({}, mixture())
    lines, _ = convert(source)
    assert "3 modules are stored as sparse-24-bitmask" in lines
    assert lines[-1].startswith("2 of them are routed experts: transformers reads them")
    assert "--dense-experts" in lines[-1]
    lines, written = convert(source, "--dense-experts")
    assert f"dense: {EXPERT.format(1)}: a routed expert, dense as asked for" in lines
    assert lines[-1] == "1 modules are stored as sparse-24-bitmask"
    assert f"{EXPERT.format(1)}.weight" in written
    assert f"{Q}.compressed" in written


def test_quantized_experts_stay_dense(checkpoint: Checkpoint) -> None:
    quantized = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    lines, written = convert(checkpoint({"quantization_config": quantized}, mixture()))
    said = "no reader packs experts that are quantized and sparse"
    assert f"dense: {EXPERT.format(0)}: {said}" in lines
    assert lines[-1] == "1 modules are stored as sparse-24-bitmask"
    assert f"{EXPERT.format(0)}.weight" in written


def test_experts_in_one_tensor_are_named(checkpoint: Checkpoint) -> None:
    packed = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{Q}.weight": TWO_FOUR, packed: torch.stack([TWO_FOUR, TWO_FOUR])}
    lines, written = convert(checkpoint({}, tensors))
    said = "the weights of all experts in one tensor: only matrices fit"
    assert f"dense: {packed}: {said}" in lines
    assert lines[-1] == "1 modules are stored as sparse-24-bitmask"
    assert packed in written
