# SPDX-License-Identifier: Apache-2.0
"""The codecs change no bit, and refuse what they cannot store."""

import sys
from types import ModuleType

import pytest
import torch
from checkpoint_files import assert_same_bits, random_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nm_permute_plugin.checkpoint import codec
from nm_permute_plugin.checkpoint.bitmask import compress_any, decompress_any
from nm_permute_plugin.checkpoint.codec import (
    clear_negative_zeros,
    compress,
    decompress,
    nonzero_bits,
)
from nm_permute_plugin.checkpoint.layout24 import WORDS

DTYPES = list(WORDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = st.tuples(st.integers(0, 9), st.integers(0, 11).map(lambda n: 4 * n))


def round_trip(weight: Tensor) -> Tensor:
    """Stored and read again."""
    stored = compress(weight)
    return decompress(stored.compressed, stored.bitmask, stored.shape)


@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    kept=st.integers(0, 2),
)
def test_every_bit_of_a_2_4_weight_comes_back(shape, dtype, seed, kept) -> None:
    weight = random_bits(*shape, dtype, seed, kept)
    stored = compress(weight)
    assert stored.compressed.shape == (shape[0], shape[1] // 2)
    assert stored.bitmask.shape == (shape[0], -(-shape[1] // 8))
    assert stored.shape.tolist() == [[shape[0]], [shape[1]]]
    assert_same_bits(round_trip(weight), weight)


@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_every_bit_of_any_weight_comes_back_from_the_general_format(
    shape, dtype, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = random_bits(shape[0], 4 * shape[1], dtype, seed, kept=4)
    weight = weight.view(WORDS[dtype])[:, : shape[1]]
    zeros = torch.rand(weight.shape, generator=generator) < 0.5
    weight = weight.masked_fill(zeros, 0).view(dtype)
    stored = compress_any(weight)
    assert_same_bits(decompress_any(**vars(stored)), weight)


@dtypes
def test_more_rows_than_are_done_at_once(dtype: torch.dtype) -> None:
    weight = random_bits(700, 516, dtype, seed=1)
    assert_same_bits(round_trip(weight), weight)


@dtypes
def test_a_view_with_strides_is_read_as_it_looks(dtype: torch.dtype) -> None:
    weight = random_bits(8, 16, dtype, seed=2)
    strided = weight.t().contiguous().t()
    assert not strided.is_contiguous()
    assert_same_bits(round_trip(strided), weight)


def test_the_bytes_are_those_of_the_first_implementation() -> None:
    # written by compressed-tensors 0.14.0.1 for this weight
    weight = torch.tensor(
        [[1, 2, 0, 0, 0, 3, 4, 0, 0, 0, 5, 6], [0, 0, 0, 0, 7, 0, 0, 0, 0, 8, 0, 9]]
    ).to(torch.bfloat16)
    stored = compress(weight)
    assert stored.bitmask.tolist() == [[0x63, 0x0C], [0x5C, 0x0A]]
    words = stored.compressed.view(torch.int16)
    assert words[0].tolist() == [0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0]
    assert words[1].tolist() == [0, 0, 0x40E0, 0, 0x4100, 0x4110]
    assert stored.shape.dtype == torch.int64


def test_the_smallest_int8_is_kept() -> None:
    weight = torch.tensor([[-128, 0, 0, 1, 0, -1, -128, 0]], dtype=torch.int8)
    assert_same_bits(round_trip(weight), weight)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=str)
def test_negative_zeros_and_nan_are_kept_where_they_fit(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-0.0, float("nan"), 0.0, 0.0]]).to(dtype)
    assert_same_bits(round_trip(weight), weight)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=str)
def test_pruned_weights_are_positive_zeros(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-1.0, -2.0, -3.0, -4.0]]) * torch.tensor([1, 1, 0, 0])
    weight = weight.to(dtype)
    with pytest.raises(ValueError, match=r"row 0, channels 0..3 hold -0\.0"):
        compress(weight)
    cleared = clear_negative_zeros(weight)
    assert nonzero_bits(cleared).tolist() == [[True, True, False, False]]
    assert_same_bits(round_trip(cleared), cleared)


@dtypes
def test_a_dense_weight_is_refused_not_pruned(dtype: torch.dtype) -> None:
    weight = random_bits(5, 24, dtype, seed=3)
    weight.view(WORDS[dtype])[3, 16:19] = 5
    weight.view(WORDS[dtype])[3, 19] = 0
    with pytest.raises(ValueError, match=r"up_proj.* row 3, channels 16..19 hold 3"):
        compress(weight, "up_proj")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2, 6), r"\(2, 6\).*multiple of 4"),
        (torch.zeros(4), r"\(4,\)"),
        (torch.zeros(2, 4, dtype=torch.float64), "float64"),
        (torch.zeros(2, 4, dtype=torch.uint8), "uint8"),
    ],
    ids=["columns", "axes", "float64", "uint8"],
)
def test_what_the_format_does_not_store_is_refused(weight, message) -> None:
    with pytest.raises(ValueError, match=message):
        compress(weight)


@given(st.integers(0, 255), st.integers(0, 2))
def test_only_two_bits_in_each_group_are_read(byte: int, column: int) -> None:
    weight = random_bits(3, 24, torch.int8, seed=4)
    stored = compress(weight)
    stored.bitmask[1, column] = byte
    if (byte & 15).bit_count() == (byte >> 4).bit_count() == 2:
        decompress(stored.compressed, stored.bitmask, stored.shape)
        return
    with pytest.raises(
        ValueError, match="row 1 of the bitmask has .* bits for channels"
    ):
        decompress(stored.compressed, stored.bitmask, stored.shape)


def test_bits_beyond_the_last_channel_are_refused() -> None:
    stored = compress(random_bits(2, 12, torch.int8, seed=5))
    stored.bitmask[1, 1] += 16
    with pytest.raises(ValueError, match="row 1 .* beyond its 12 channels"):
        decompress(stored.compressed, stored.bitmask, stored.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": torch.tensor([[2], [20]])}, r"shape says \[2, 20\]"),
        ({"shape": torch.tensor([[2], [18]])}, "multiple of 4"),
        ({"shape": torch.tensor([2.0, 16.0])}, "float32"),
        ({"shape": torch.tensor([2])}, r"says \[2\]"),
        ({"shape": torch.tensor([-2, 16])}, r"says \[-2, 16\]"),
        ({"bitmask": torch.zeros(2, 3, dtype=torch.uint8)}, r"they are .*\(2, 3\)"),
        ({"bitmask": torch.zeros(2, 2, dtype=torch.int8)}, "bitmask torch.int8"),
        ({"compressed": torch.zeros(2, 4)}, r"should be \(2, 8\)"),
        ({"compressed": torch.zeros(2, 8).double()}, "float64"),
    ],
)
def test_tensors_that_disagree_are_refused(change, message) -> None:
    stored = vars(compress(random_bits(2, 16, torch.float32, seed=6)))
    with pytest.raises(ValueError, match=message):
        decompress(**{**stored, **change}, name="layer")


@pytest.mark.parametrize(
    "change",
    [
        {"row_offsets": torch.tensor([0, 9])},
        {"compressed": torch.zeros(4)},
        {"bitmask": torch.full((2, 1), 255, dtype=torch.uint8)},
        {"shape": torch.tensor([2, 9])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_general_tensors_that_disagree_are_refused(change) -> None:
    stored = vars(compress_any(torch.tensor([[1.0, 0, 2], [0, 0, 3]])))
    with pytest.raises(ValueError, match="damaged"):
        decompress_any(**{**stored, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("columns", [512, 516])
@dtypes
def test_a_gpu_stores_the_same_bytes(dtype: torch.dtype, columns: int) -> None:
    weight = random_bits(300, columns, dtype, seed=7)
    here, there = compress(weight), compress(weight.cuda())
    for part, tensor in vars(there).items():
        assert tensor.is_cuda
        assert_same_bits(tensor.cpu(), getattr(here, part))
    assert_same_bits(decompress(**vars(there)).cpu(), weight)


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_where_triton_fails_pytorch_packs_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def damaged(*arguments: object) -> None:
        asked.append(arguments)
        raise ValueError("Expecting value: line 1 column 1 (char 0)")

    stand_in = ModuleType("stand_in")  # importing the true one takes Triton
    stand_in.compress_in_triton = stand_in.decompress_in_triton = damaged
    name = "nm_permute_plugin.checkpoint.codec_triton"
    monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(codec, "FAULTS", [])
    monkeypatch.setattr(codec, "find_spec", lambda name: True)
    weight = random_bits(8, 16, torch.bfloat16, 0, 2)
    stored = compress(weight.as_subclass(OnGpu))
    back = decompress(stored.compressed, stored.bitmask, stored.shape)
    assert_same_bits(back.as_subclass(Tensor), weight)
    assert len(asked) == 1
    assert codec.FAULTS == ["ValueError: Expecting value: line 1 column 1 (char 0)"]
