# SPDX-License-Identifier: Apache-2.0
"""``nm-permute convert`` says what it leaves dense, why, and what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import assert_one_error, listing, nm_permute
from loguru import logger
from safetensors.torch import load_file, save_file

from nm_permute_plugin.checkpoint import writer

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
    result = nm_permute("convert", source, out, *options)
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
    assert lines[-1].startswith("2 of them are routed experts: vLLM with this plugin")
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


DENSE = torch.arange(1.0, 129.0).view(8, 16).bfloat16()


def refused(source: Path, message: str, *options: str, out: str = "refused") -> None:
    """The command ends with one line, and nothing is written."""
    before = listing(source.parent)
    assert_one_error(
        nm_permute("convert", source, source.parent / out, *options), message
    )
    assert listing(source.parent) == before


def test_what_is_not_sparse_is_refused(checkpoint: Checkpoint) -> None:
    tensors = {f"{Q}.weight": DENSE, "lm_head.weight": DENSE.clone()}
    source = checkpoint({}, tensors)
    said = (
        r"is not sparse: none of its matrices is 2:4 \(.*q_proj: row 0, channels 0\.\.3"
    )
    refused(source, said)
    refused(source, said, "--format", "sparse-bitmask")
    refused(source, said, "--clear-zeros")
    refused(source, "every matrix is dense already", "--format", "dense")
    conv1d = {"transformer.h.0.attn.c_attn.weight": DENSE}
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    save_file(conv1d, source / "model.safetensors", {"format": "pt"})
    refused(source, r"none of its matrices is 2:4 \(transformer\.h\.0\.attn\.c_attn:")


def test_a_product_with_a_mask_is_cleared_where_asked_for(
    checkpoint: Checkpoint,
) -> None:
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(8, 4).bfloat16()
    masked = {f"{Q}.weight": -DENSE * mask, f"{Q[:-6]}k_proj.weight": DENSE * mask}
    source = checkpoint({}, masked)
    refused(
        source, rf"{Q} and 0 other matrices are 2:4 but for -0\.0, .* --clear-zeros"
    )
    refused(source, "is for sparse formats", "--format", "dense", "--clear-zeros")
    lines, written = convert(source, "--clear-zeros")
    assert lines[-1] == "2 modules are stored as sparse-24-bitmask"
    assert f"{Q}.compressed" in written
    (out,) = source.parent.glob("out*")
    result = nm_permute("convert", out, source.parent / "back", "--format", "dense")
    assert result.exit_code == 0, result.output
    weight = load_file(source.parent / "back" / "model.safetensors")[f"{Q}.weight"]
    assert torch.equal(weight, -DENSE * mask)
    assert not torch.signbit(weight[weight == 0]).any()


def test_levels_around_a_zero_point_stay_dense(checkpoint: Checkpoint) -> None:
    """As the save and ``verify`` see it, they are 2:4, and no format holds them."""
    levels = {f"{Q}.weight": TWO_FOUR.to(torch.int8) + 7}
    levels |= {f"{Q}.weight_scale": torch.ones(8, 1)}
    levels |= {f"{Q}.weight_zero_point": torch.full((8, 1), 7, dtype=torch.int8)}
    quantized = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    source = checkpoint({"quantization_config": quantized}, levels)
    assert nm_permute("verify", source, "--pattern", "2:4").exit_code == 0
    lines, written = convert(source)
    assert f"dense: {Q}: quantized around a zero point, zeros are not stored as" in (
        "\n".join(lines)
    )
    assert written == set(levels)


@pytest.mark.parametrize("step", ["make_plan", "_write_shard"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_of_two_runs_into_one_folder_the_first_result_stands(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, there: bool, step: str
) -> None:
    """A whole second run ends while the first is at work, which then gives way."""
    source = checkpoint({}, mixture())
    out = source.parent / "out"
    if there:
        out.mkdir()
    stock, runs = getattr(writer, step), []

    def slow(*arguments: object) -> object:
        monkeypatch.setattr(writer, step, stock)
        runs.append(nm_permute("convert", source, out, "--dense-experts"))
        return stock(*arguments)

    monkeypatch.setattr(writer, step, slow)
    late = nm_permute("convert", source, out)
    assert runs[0].exit_code == 0, runs[0].output
    assert_one_error(late, r"out was written by something else .* is in \S*out-2$")
    assert f"{EXPERT.format(0)}.weight" in load_file(out / "model.safetensors")
    assert nm_permute("verify", out).exit_code == 0
    assert nm_permute("verify", source.parent / "out-2").exit_code == 0
    assert sorted(p.name for p in source.parent.iterdir()) == ["out", "out-2", "source"]


def test_a_file_that_appears_meanwhile_stays(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint({}, mixture())
    out = source.parent / "out"
    write = writer._write_shard

    def slow(*arguments: object) -> None:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        write(*arguments)

    monkeypatch.setattr(writer, "_write_shard", slow)
    assert nm_permute("convert", source, out).exit_code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert nm_permute("verify", out).exit_code == 0


def test_what_is_stored_so_already_is_said_to_be(checkpoint: Checkpoint) -> None:
    names = [Q, Q.replace("q_proj", "o_proj")]
    tensors = {f"{name}.weight": TWO_FOUR.clone() for name in names}
    dense = checkpoint({"model_type": "llama"}, tensors)
    sparse, again = dense.parent / "sparse", dense.parent / "again"
    first = nm_permute("convert", dense, sparse)
    assert first.exit_code == 0, first.output
    assert "nothing had to be done" not in first.stdout
    second = nm_permute("convert", sparse, again)
    said = f"nothing had to be done: every matrix of {sparse} was stored so already"
    assert said in second.stdout
    back = nm_permute("convert", sparse, dense.parent / "back", "--format", "dense")
    assert "nothing had to be done" not in back.stdout


def test_the_log_counts_what_is_sparse_of_all(checkpoint: Checkpoint) -> None:
    said: list[str] = []
    sink = logger.add(said.append, format="{message}")
    tensors = {f"{Q}.weight": TWO_FOUR.clone(), f"{Q}2.weight": TWO_FOUR + 1}
    source = checkpoint({"model_type": "llama"}, tensors)
    out = source.parent / "sparse"
    nm_permute("convert", source, out)
    nm_permute("convert", out, source.parent / "back", "--format", "dense")
    logger.remove(sink)
    lines = [line for line in said if "the weights take" in line]
    assert (
        "1 of 2 matrices are stored as sparse-24-bitmask, the others dense" in lines[0]
    )
    assert "all 2 matrices are stored dense; the weights take" in lines[1]
