# SPDX-License-Identifier: Apache-2.0
"""Our files and those of the format's first implementation are the same files."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    KINDS,
    MakeDense,
    assert_same_bits,
    assert_same_tensors,
    tensors_of,
)
from safetensors.torch import load_file, save_file

from nm_permute_plugin.checkpoint.bitmask import compress_any, decompress_any
from nm_permute_plugin.checkpoint.codec import compress, decompress
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern

PYTHON = os.environ.get("NM_PERMUTE_ORACLE_PYTHON")
SCRIPT = Path(__file__).parent / "oracle" / "oracle.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON,
        reason="NM_PERMUTE_ORACLE_PYTHON names no interpreter with compressed-tensors "
        "0.14.0.1 and transformers 4.57.6",
    ),
]


def oracle(*words: object) -> None:
    """Run the oracle, and show what it says when it fails."""
    command = [str(PYTHON), str(SCRIPT), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(dtype: torch.dtype, two_in_each: bool) -> dict[str, torch.Tensor]:
    """2:4 weights of several widths; groups with fewer than two non-zeros too."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for columns in (4, 8, 12, 64, 100):
        weight = torch.randn(33, columns, generator=generator)
        weight = weight + weight.sign()  # far from zero, also in 8 bits
        weight[
            ~nm_mask(torch.rand(33, columns, generator=generator), NMPattern(2, 4))
        ] = 0
        if not two_in_each:
            weight[torch.rand(33, columns, generator=generator) < 0.5] = 0
        made[f"layer{columns}.weight"] = (weight * 20).to(dtype)
    return made


@pytest.mark.parametrize("sparser", [False, True], ids=["two a group", "fewer"])
@pytest.mark.parametrize("dtype", list(WORDS), ids=str)
def test_both_compress_to_the_same_bytes(
    tmp_path: Path, dtype: torch.dtype, sparser: bool
) -> None:
    dense = weights(dtype, two_in_each=not sparser)
    save_file(dense, tmp_path / "dense.safetensors")
    theirs = tmp_path / "theirs.safetensors"
    oracle("compress", tmp_path / "dense.safetensors", theirs, "sparse-24-bitmask")
    ours = {}
    for name, weight in dense.items():
        stored = compress(weight)
        module = name.removesuffix(".weight")
        ours |= {f"{module}.{part}": tensor for part, tensor in vars(stored).items()}
    assert_same_tensors(ours, load_file(theirs))
    for name, weight in dense.items():
        found = load_file(theirs)
        module = name.removesuffix(".weight")
        parts = {p: found[f"{module}.{p}"] for p in ("compressed", "bitmask", "shape")}
        assert_same_bits(decompress(**parts), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_both_make_the_same_general_bitmasks(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    dense = weights(dtype, two_in_each=False)
    save_file(dense, tmp_path / "dense.safetensors")
    oracle("compress", tmp_path / "dense.safetensors", tmp_path / "c", "sparse-bitmask")
    theirs = load_file(tmp_path / "c")
    for name, weight in dense.items():
        module = name.removesuffix(".weight")
        stored = vars(compress_any(weight))
        for part, tensor in stored.items():
            assert_same_bits(tensor, theirs[f"{module}.{part}"])
        parts = {part: theirs[f"{module}.{part}"] for part in stored}
        assert_same_bits(decompress_any(**parts), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_its_decompressor_reads_our_checkpoint(
    tmp_path: Path, make_dense: MakeDense, kind: str
) -> None:
    dense = make_dense(kind)
    convert(dense, tmp_path / "sparse", "sparse-24-bitmask")
    oracle("decompress", tmp_path / "sparse", tmp_path / "read", "sparse-24-bitmask")
    assert_same_tensors(load_file(tmp_path / "read"), tensors_of(dense))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_4_computes_the_same_logits(
    tmp_path: Path, make_dense: MakeDense, kind: str
) -> None:
    assert_same_logits(tmp_path, make_dense(kind), kind)


def test_transformers_4_reads_a_single_file(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    assert_same_logits(tmp_path, make_dense(shard="1GB"))


def test_transformers_4_reads_named_targets(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    kept = ("lm_head", "model.layers.0.mlp.down_proj")
    assert_same_logits(tmp_path, make_dense(keep_dense=kept))


def assert_same_logits(path: Path, dense: Path, kind: str = "bf16") -> None:
    """The oracle computes the same from a checkpoint and from its sparse form."""
    convert(dense, path / "old", "dense", legacy=True)
    convert(dense, path / "sparse", "sparse-24-bitmask", legacy=True)
    dtype = "float16" if kind == "fp16" else "bfloat16"
    words = [path / name for name in ("old", "expected", "sparse", "found")]
    oracle("logits", dtype, *words)
    expected = load_file(path / "expected")["logits"]
    assert float(expected.float().std()) > 0.1
    assert_same_bits(load_file(path / "found")["logits"], expected)
