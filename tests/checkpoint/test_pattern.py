# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is held to its pattern however it is stored; the format fits it."""

from pathlib import Path

import pytest
import torch
from checkpoint_files import KINDS, MakeDense, tensors_of
from safetensors.torch import save_file

from nm_permute_plugin.checkpoint.codec import WORDS
from nm_permute_plugin.checkpoint.directory import SINGLE
from nm_permute_plugin.checkpoint.pattern import check_pattern, choose_format
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.maths.pattern import NMPattern

DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"
TWO_FOUR, FOUR_EIGHT = NMPattern(2, 4), NMPattern(4, 8)


@pytest.mark.parametrize("form", ["dense", "sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_the_pattern_passes(
    tmp_path: Path, make_dense: MakeDense, kind: str, form: str
) -> None:
    convert(make_dense(kind), tmp_path / "x", form)
    check_pattern(tmp_path / "x", [DOWN, UP], TWO_FOUR)


@pytest.mark.parametrize("kind", KINDS)
def test_one_weight_too_many_is_named(make_dense: MakeDense, kind: str) -> None:
    dense = make_dense(kind, "1GB")
    tensors = tensors_of(dense)
    weight = tensors[f"{DOWN}.weight"]
    words = weight.view(WORDS[weight.dtype])
    words[7, 12:15], words[7, 15] = 40, 0
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    check_pattern(dense, [UP], TWO_FOUR)
    with pytest.raises(
        ValueError, match=rf"{DOWN} is not 2:4 .* row 7, channels 12\.\.15 hold 3"
    ):
        check_pattern(dense, [UP, DOWN], TWO_FOUR)


def test_negative_zeros_count_as_zeros(make_dense: MakeDense) -> None:
    dense = make_dense(shard="1GB")
    tensors = tensors_of(dense)
    tensors[f"{DOWN}.weight"][tensors[f"{DOWN}.weight"] == 0] = -0.0
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    check_pattern(dense, [DOWN], TWO_FOUR)


def test_a_module_that_was_not_saved_is_missed(make_dense: MakeDense) -> None:
    with pytest.raises(ValueError, match="nowhere was pruned, and the checkpoint has"):
        check_pattern(make_dense(), [DOWN, "nowhere"], TWO_FOUR)


@pytest.mark.parametrize(
    ("asked", "pattern", "kind", "expected"),
    [
        ("auto", TWO_FOUR, "bf16", "sparse-24-bitmask"),
        ("auto", TWO_FOUR, "fp8", "sparse-24-bitmask"),
        ("auto", TWO_FOUR, "int8", "sparse-24-bitmask"),
        ("auto", FOUR_EIGHT, "bf16", "dense"),
        ("dense", TWO_FOUR, "bf16", "dense"),
        ("sparse-bitmask", FOUR_EIGHT, "fp8", "sparse-bitmask"),
    ],
)
def test_the_format_fits(
    make_dense: MakeDense, asked: str, pattern: NMPattern, kind: str, expected: str
) -> None:
    assert choose_format(make_dense(kind), asked, pattern, [DOWN])[0] == expected


def test_nothing_pruned_is_stored_dense(make_dense: MakeDense) -> None:
    assert choose_format(make_dense(), "auto", TWO_FOUR, []) == (
        "dense",
        "nothing is pruned",
    )


EXPERT = "model.layers.0.mlp.experts.0.up_proj"


@pytest.mark.parametrize(
    ("asked", "kind", "pruned", "expected"),
    [
        ("auto", "bf16", [DOWN, EXPERT], ("sparse-24-bitmask", "experts are stored")),
        ("auto", "bf16", [EXPERT], ("dense", "the default for")),
        ("sparse-24-bitmask", "bf16", [EXPERT], ("sparse-24-bitmask", "asked for")),
        ("auto", "fp8", [DOWN, EXPERT], ("dense", "quantized and sparse")),
    ],
)
def test_experts_are_sparse_where_asked_for(
    make_dense: MakeDense, asked: str, kind: str, pruned: list[str], expected: tuple
) -> None:
    format, reason = choose_format(make_dense(kind), asked, TWO_FOUR, pruned)
    assert format == expected[0]
    assert expected[1] in reason


def test_what_is_stored_transposed_is_held_to_its_inputs(tmp_path: Path) -> None:
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    save_file({"c_fc.weight": weight}, tmp_path / SINGLE, {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    check_pattern(tmp_path, ["c_fc"], TWO_FOUR, transposed=["c_fc"])
    found, reason = choose_format(tmp_path, "auto", TWO_FOUR, ["c_fc"], ["c_fc"])
    assert found == "dense"
    assert "Conv1D" in reason
    weight[1, 0] = 2.0
    save_file({"c_fc.weight": weight}, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"c_fc is not 2:4 .* row 0, channels 0\.\.3"):
        check_pattern(tmp_path, ["c_fc"], TWO_FOUR, transposed=["c_fc"])
