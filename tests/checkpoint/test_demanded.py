# SPDX-License-Identifier: Apache-2.0
"""A demanded pattern is demanded of every prunable matrix, and of no other."""

from pathlib import Path

import pytest
import torch
from checkpoint_files import MakeDense
from safetensors.torch import save_file

from nm_permute_plugin.checkpoint.directory import SINGLE
from nm_permute_plugin.checkpoint.plan import TWO_FOUR
from nm_permute_plugin.checkpoint.prunable import is_prunable
from nm_permute_plugin.checkpoint.verify import Report, verify
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.maths.pattern import NMPattern

DOWN = "model.layers.0.mlp.down_proj"
LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYER = (*LAYER, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS = {f"model.layers.{i}.{name}" for i in range(2) for name in LAYER}


def demanded(report: Report) -> set[str]:
    """What was held to the pattern."""
    return {row.module for row in report.rows if row.promised}


def test_a_dense_model_breaks_it_in_every_linear(tiny_checkpoint) -> None:
    dense = tiny_checkpoint()
    assert verify(dense).good
    report = verify(dense, pattern=TWO_FOUR)
    assert {fault.tensor for fault in report.faults} == LINEARS == demanded(report)
    assert all("is not 2:4: row 0, channels" in f.message for f in report.faults)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_sparse_model_in_dense_form_follows_it(
    make_dense: MakeDense, kind: str
) -> None:
    report = verify(make_dense(kind), pattern=TWO_FOUR)
    assert report.faults == ()
    assert demanded(report) == LINEARS


def test_a_step_of_training_breaks_it(make_dense: MakeDense, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert(make_dense(), tmp_path / "sparse", "sparse-24-bitmask")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").train()
    tokens = torch.arange(32)[None]
    model(tokens, labels=tokens).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    model.save_pretrained(tmp_path / "tuned")
    report = verify(tmp_path / "tuned", pattern=TWO_FOUR)
    assert {fault.tensor for fault in report.faults} == LINEARS


def test_what_the_config_leaves_out_is_not_demanded(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    convert(make_dense(keep_dense=("lm_head", DOWN)), tmp_path / "x", "sparse-bitmask")
    report = verify(tmp_path / "x", pattern=TWO_FOUR)
    assert report.faults == ()
    assert demanded(report) == LINEARS - {DOWN}
    assert not verify(tmp_path / "x", pattern=NMPattern(1, 4)).good


def checkpoint_of(path: Path, config: str, **tensors: torch.Tensor) -> Path:
    """The folder of a checkpoint of one file."""
    save_file(tensors, path / SINGLE, {"format": "pt"})
    (path / "config.json").write_text(config)
    return path


def test_a_conv1d_is_held_to_it_along_its_inputs(tmp_path: Path) -> None:
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0]).repeat(8, 2)
    name = "transformer.h.0.mlp.c_fc.weight"
    config = '{"model_type": "gpt2"}'
    good = checkpoint_of(tmp_path, config, **{name: weight.t().contiguous()})
    assert verify(good, pattern=TWO_FOUR).good
    bad = checkpoint_of(tmp_path, config, **{name: weight})
    assert len(verify(bad, pattern=TWO_FOUR).faults) == 1


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.mlp.experts.up_proj", (2, 8, 8), "the weights of all experts"),
        ("lm_head.weight", (8, 8), "no linear of a layer is here"),
    ],
    ids=["experts in one tensor", "only a head"],
)
def test_what_cannot_be_checked_is_a_fault(
    tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    path = checkpoint_of(tmp_path, "{}", **{name: torch.zeros(shape)})
    (fault,) = verify(path, pattern=TWO_FOUR).faults
    assert message in fault.message
    assert verify(path).good


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.0.mlp.experts.3.down_proj", True),
        ("model.decoder.layers.11.fc1", True),
        ("vit.encoder.layer.2.attention.output.dense", True),
        ("visual.blocks.0.attn.qkv", True),
        ("transformer.h.0.attn.c_attn", True),
        ("model.layers.0.mlp.gate", False),
        ("model.layers.0.mlp.shared_expert_gate", False),
        ("model.layers.0.feed_forward.router.classifier", False),
        ("model.decoder.embed_positions", False),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", False),
        ("score", False),
    ],
)
def test_prunable_is_what_the_package_prunes(module: str, expected: bool) -> None:
    assert is_prunable(module) == expected
