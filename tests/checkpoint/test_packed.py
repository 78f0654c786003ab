# SPDX-License-Identifier: Apache-2.0
"""Packed weights are read as compressed-tensors packs them; what is odd is refused."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import tensors_of
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from nm_permute_plugin.checkpoint.directory import SINGLE, open_checkpoint
from nm_permute_plugin.checkpoint.packed import packed_levels, packed_modules, unpack
from nm_permute_plugin.checkpoint.pattern import check_pattern
from nm_permute_plugin.checkpoint.record import FOLDER
from nm_permute_plugin.checkpoint.shards import DamagedError
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.maths.pattern import NMPattern

MODULE = "layers.0.linear"
TWO_FOUR = NMPattern(2, 4)


@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 5),
    columns=st.integers(1, 90),
    seed=st.integers(0, 2**31),
)
def test_every_width_is_unpacked(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << bits - 1
    levels = torch.randint(-half, half, (rows, columns), generator=generator).to(
        torch.int8
    )
    assert torch.equal(unpack(pack_to_int32(levels, bits), bits, columns), levels)


def test_more_rows_than_are_unpacked_at_once() -> None:
    levels = torch.arange(600 * 8).view(600, 8).remainder(16).sub(8).to(torch.int8)
    assert torch.equal(unpack(pack_to_int32(levels, 4), 4, 8), levels)


def make_packed(path: Path, levels: torch.Tensor, points: torch.Tensor | None) -> Path:
    """A checkpoint of one 4-bit module, and the record of the run that pruned it."""
    path.mkdir()
    tensors = {
        f"{MODULE}.weight_packed": pack_to_int32(levels, 4).contiguous(),
        f"{MODULE}.weight_scale": torch.ones(len(levels), 2),
        f"{MODULE}.weight_shape": torch.tensor(list(levels.shape)),
    }
    if points is not None:
        packed = pack_to_int32(points, 4, packed_dim=0)
        tensors[f"{MODULE}.weight_zero_point"] = packed.contiguous()
    save_file(tensors, path / SINGLE, {"format": "pt"})
    holder = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
    }
    (path / "config.json").write_text(json.dumps({"quantization_config": holder}))
    report = {"pruned": [MODULE], "modifier": {"mask_structure": "2:4"}}
    (path / FOLDER).mkdir()
    (path / FOLDER / "report.json").write_text(json.dumps(report))
    return path


def sparse_levels(zero: int = 0) -> torch.Tensor:
    """16 rows of 16 channels: two of four at the zero, the others apart from it."""
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(1, 5, (16, 16), generator=generator) + zero
    order = torch.rand(16, 4, 4, generator=generator).argsort(-1).view(16, 16)
    return levels.masked_fill(order < 2, zero).to(torch.int8)


def test_zeros_of_symmetric_levels(tmp_path: Path) -> None:
    path = make_packed(tmp_path / "x", sparse_levels(), None)
    checkpoint = open_checkpoint(path)
    assert packed_modules(checkpoint) == [MODULE]
    assert torch.equal(packed_levels(checkpoint, MODULE), sparse_levels())
    check_pattern(open_checkpoint(path), [MODULE], TWO_FOUR)
    assert verify(path).good


def test_zeros_of_levels_around_a_zero_point(tmp_path: Path) -> None:
    levels = torch.cat([sparse_levels(-3)[:, :8], sparse_levels(2)[:, 8:]], 1)
    points = torch.tensor([[-3, 2]], dtype=torch.int8).repeat(16, 1)
    path = make_packed(tmp_path / "x", levels, points)
    check_pattern(open_checkpoint(path), [MODULE], TWO_FOUR)
    assert verify(path).good
    with pytest.raises(ValueError, match="is not 2:4 any more: row 0, channels"):
        check_pattern(
            open_checkpoint(make_packed(tmp_path / "y", levels, points + 1)),
            [MODULE],
            TWO_FOUR,
        )


def test_a_filled_zero_is_named(tmp_path: Path) -> None:
    levels = sparse_levels()
    levels[5, 8:11] = 1
    path = make_packed(tmp_path / "x", levels, None)
    with pytest.raises(ValueError, match=rf"{MODULE} .* row 5, channels 8\.\.11 hold"):
        check_pattern(open_checkpoint(path), [MODULE], TWO_FOUR)
    (fault,) = verify(path).faults
    assert (fault.tensor, fault.file) == (MODULE, SINGLE)
    assert "is not 2:4: row 5, channels 8..11" in fault.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_shape": None}, "no layers.0.linear.weight_shape"),
        ({"weight_shape": torch.tensor([16, 24])}, "2 words for 24 channels"),
        ({"weight_shape": torch.tensor([8, 16])}, r"says \[8, 16\]"),
        ({"weight_packed": torch.zeros(16, 2, dtype=torch.int64)}, "int64"),
    ],
    ids=["no shape", "columns", "rows", "dtype"],
)
def test_packed_tensors_that_disagree_are_refused(
    tmp_path: Path, change: dict, message: str
) -> None:
    path = make_packed(tmp_path / "x", sparse_levels(), None)
    tensors = tensors_of(path)
    for name, tensor in change.items():
        del tensors[f"{MODULE}.{name}"]
        if tensor is not None:
            tensors[f"{MODULE}.{name}"] = tensor
    save_file(tensors, path / SINGLE, {"format": "pt"})
    with pytest.raises((DamagedError, NotImplementedError), match=message):
        packed_levels(open_checkpoint(path), MODULE)
    (fault,) = verify(path).faults
    assert fault.tensor == MODULE


def test_a_record_that_is_none_is_a_fault(tmp_path: Path) -> None:
    path = make_packed(tmp_path / "x", sparse_levels(), None)
    (path / FOLDER / "report.json").write_text('{"pruned": 3}')
    (fault,) = verify(path).faults
    assert fault.file == "nm_permute/report.json"
