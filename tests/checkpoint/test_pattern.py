# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is held to its pattern, however it is stored."""

from pathlib import Path

import pytest
import torch
from checkpoint_files import KINDS, MakeDense, tensors_of
from safetensors.torch import save_file

from nm_permute_plugin.checkpoint.directory import SINGLE, open_checkpoint
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.checkpoint.pattern import Violation, check_pattern, examine
from nm_permute_plugin.checkpoint.plan import choose_format
from nm_permute_plugin.checkpoint.shards import DamagedError
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern

DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"
TWO_FOUR = NMPattern(2, 4)


@pytest.mark.parametrize("form", ["dense", "sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_the_pattern_passes(
    tmp_path: Path, make_dense: MakeDense, kind: str, form: str
) -> None:
    convert(make_dense(kind), tmp_path / "x", form)
    check_pattern(open_checkpoint(tmp_path / "x"), [DOWN, UP], TWO_FOUR)


@pytest.mark.parametrize("kind", KINDS)
def test_one_weight_too_many_is_named(make_dense: MakeDense, kind: str) -> None:
    dense = make_dense(kind, "1GB")
    tensors = tensors_of(dense)
    weight = tensors[f"{DOWN}.weight"]
    words = weight.view(WORDS[weight.dtype])
    words[7, 12:15], words[7, 15] = 40, 0
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    check_pattern(open_checkpoint(dense), [UP], TWO_FOUR)
    with pytest.raises(
        ValueError, match=rf"{DOWN} is not 2:4 .* row 7, channels 12\.\.15 hold 3"
    ):
        check_pattern(open_checkpoint(dense), [UP, DOWN], TWO_FOUR)


def test_negative_zeros_count_as_zeros(make_dense: MakeDense) -> None:
    dense = make_dense(shard="1GB")
    tensors = tensors_of(dense)
    tensors[f"{DOWN}.weight"][tensors[f"{DOWN}.weight"] == 0] = -0.0
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    check_pattern(open_checkpoint(dense), [DOWN], TWO_FOUR)


def test_a_module_that_was_not_saved_is_missed(make_dense: MakeDense) -> None:
    with pytest.raises(ValueError, match="nowhere was pruned, and the checkpoint has"):
        check_pattern(open_checkpoint(make_dense()), [DOWN, "nowhere"], TWO_FOUR)


def test_what_is_stored_transposed_is_held_to_its_inputs(tmp_path: Path) -> None:
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    save_file({"c_fc.weight": weight}, tmp_path / SINGLE, {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    check_pattern(open_checkpoint(tmp_path), ["c_fc"], TWO_FOUR, transposed=["c_fc"])
    checkpoint = open_checkpoint(tmp_path)
    found, reason = choose_format(checkpoint, "auto", TWO_FOUR, ["c_fc"], ["c_fc"])
    assert found == "dense"
    assert "Conv1D" in reason
    weight[1, 0] = 2.0
    save_file({"c_fc.weight": weight}, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"c_fc is not 2:4 .* row 0, channels 0\.\.3"):
        check_pattern(
            open_checkpoint(tmp_path), ["c_fc"], TWO_FOUR, transposed=["c_fc"]
        )


PATTERNS = ["1:2", "2:4", "1:4", "3:4", "4:8", "2:8", "5:16"]


def place_of(levels: torch.Tensor, pattern: NMPattern) -> tuple[int | None, int, int]:
    """Row, channel and number of non-zeros of the first group that breaks a pattern."""
    found = examine(levels, pattern)
    assert isinstance(found, Violation)
    return found.row, found.channel, found.count


@pytest.mark.parametrize("text", PATTERNS)
def test_a_masked_weight_holds_no_violation(
    text: str, generator: torch.Generator
) -> None:
    pattern = NMPattern.parse(text)
    weight = torch.randn(5, 4 * pattern.m, generator=generator)
    masked = weight.masked_fill(~nm_mask(weight.abs(), pattern), 0)
    assert examine(masked, pattern) == int((masked != 0).sum())
    assert place_of(weight, pattern) == (0, 0, pattern.m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
def test_the_first_violation_is_named(dtype: torch.dtype) -> None:
    weight = torch.zeros(4, 12, dtype=dtype)
    weight[2, 8:11] = 1
    weight[3, 0:4] = 1
    assert place_of(weight, TWO_FOUR) == (2, 8, 3)


def test_fewer_than_n_non_zeros_are_no_violation() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert examine(weight, TWO_FOUR) == 1


def test_a_violation_says_what_explains_it() -> None:
    wide = torch.zeros(4, 6)
    assert str(examine(wide, TWO_FOUR)) == "its shape [4, 6] holds no groups of 4"
    weight = torch.tensor([[1.0], [1.0], [0.0], [0.0]]).repeat(2, 8)
    found = examine(weight, TWO_FOUR)
    assert str(found) == (
        "row 0, channels 0..3 hold 4 non-zeros. It is along the other axis: it was "
        "pruned over outputs"
    )
    weight = torch.tensor([[-0.0, 1.0, 0.0, 2.0]] * 3)
    assert str(examine(weight, TWO_FOUR)).endswith("3 non-zeros, some of them -0.0")


@pytest.mark.parametrize("shape", [(32, 1), (1,), (32, 4)], ids=str)
def test_plain_levels_are_held_to_their_zero_point_by_the_save_and_by_verify(
    make_dense: MakeDense, shape: tuple[int, ...]
) -> None:
    dense = make_dense("int8", "1GB")
    tensors = tensors_of(dense)
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].clamp(-100, 100) + 7
    tensors[f"{DOWN}.weight_zero_point"] = torch.full(shape, 7, dtype=torch.int8)
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    check_pattern(open_checkpoint(dense), [DOWN], TWO_FOUR)
    report = verify(dense, modules=[DOWN])
    assert report.faults == ()
    (row,) = [row for row in report.rows if row.module == DOWN]
    assert row.zeros >= 0.5
    tensors[f"{DOWN}.weight"][5, :4] = 9
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"row 5, channels 0\.\.3 hold 4"):
        check_pattern(open_checkpoint(dense), [DOWN], TWO_FOUR)
    (fault,) = verify(dense, modules=[DOWN]).faults
    assert fault.message == "is not 2:4: row 5, channels 0..3 hold 4 non-zeros"


def test_a_zero_point_of_another_weight_is_a_fault(make_dense: MakeDense) -> None:
    dense = make_dense("int8", "1GB")
    tensors = tensors_of(dense)
    tensors[f"{DOWN}.weight_zero_point"] = torch.zeros(5, 1, dtype=torch.int8)
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    with pytest.raises(DamagedError, match=r"weight_zero_point is \[5, 1\]"):
        check_pattern(open_checkpoint(dense), [DOWN], TWO_FOUR)
    assert "is [5, 1]" in verify(dense).faults[0].message


def test_a_dtype_that_no_format_stores_is_checked_all_the_same(tmp_path: Path) -> None:
    weight = torch.tensor([[0.0, -0.0, 1.0, 1.0]] * 2, dtype=torch.float64)
    save_file({"a.fc.weight": weight}, tmp_path / SINGLE, {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    check_pattern(open_checkpoint(tmp_path), ["a.fc"], TWO_FOUR)
    assert verify(tmp_path, modules=["a.fc"]).faults == ()
