# SPDX-License-Identifier: Apache-2.0
"""
Packs a 2:4 weight as the tensor cores' sparse operand, in the order that they read it.

The unit is a *chunk*: 32 rows x 128 channels, 32 groups of four channels in each row. A
warp of 32 lanes multiplies a chunk in steps of 32 channels (int8: 64). Each lane holds
pieces of 16 bytes of the chunk: first kept values, last metadata (4 bits a group: the
places of its two values). Pieces lie in memory as [rows / 32, chunk, piece, lane], so
that a warp reads one piece from 512 consecutive bytes.

The tensor cores see the groups of a step in another order than the channels': the one for
which a lane needs 16 consecutive bytes of a token. The order does not change the sums.
"""

from functools import lru_cache

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from nm_permute_plugin.checkpoint.codec import (
    clear_negative_zeros,
    compress,
)
from nm_permute_plugin.checkpoint.layout24 import WORDS

ROWS, CHANNELS = 32, 128
"""A chunk has this shape; a weight's shape must be a multiple of it."""

CODES = [0, 0, 0, 4, 0, 8, 9, 0, 0, 12, 13, 0, 14, 0, 0, 0]
"""Maps a group's four bits of the bitmask to its metadata: the two kept channels, two bits
each, the first in the low bits."""


def pack(weight: Tensor) -> UInt8[Tensor, "tiles chunks bytes"]:
    """
    Pack a weight in the tensor cores' order.

    :param weight: [out, in], 2:4; ``out`` a multiple of 32, ``in`` of 128
    :raises ValueError: if it is not 2:4, or of another shape or dtype
    """
    rows, channels = weight.shape
    if rows % ROWS or channels % CHANNELS:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} does not divide into chunks of "
            f"{ROWS} x {CHANNELS}; use another kernel for it"
        )
    stored = compress(clear_negative_zeros(weight))
    order = group_order(weight.dtype).to(weight.device)
    steps, groups = order.shape
    chunks = channels // CHANNELS
    tiles = rows // ROWS
    codes = torch.tensor(CODES, device=weight.device)
    nibbles = torch.stack((stored.bitmask & 15, stored.bitmask >> 4), -1)
    places = codes[nibbles.int()].view(rows, chunks, -1)[:, :, order.flatten()]
    words = stored.compressed.view(WORDS[weight.dtype]).view(rows, chunks, -1, 2)
    values = words[:, :, order.flatten()]
    sizes = _sizes(tiles, chunks, weight.dtype)
    lane_first, meta_first = _orders(weight.dtype)
    values = _arrange(values.view(_shape(VALUES, sizes)), VALUES, lane_first)
    bits = 4 * torch.arange(groups // 2, device=weight.device)
    meta = (places.view(*_shape(META, sizes), -1) << bits).sum(-1)
    meta = _as_bytes(_arrange(meta, META, meta_first), _meta_dtype(weight.dtype))
    chunked = values.reshape(tiles, chunks, -1).view(torch.uint8)
    return torch.cat((chunked, meta.view(tiles, chunks, -1)), -1)


def unpack(
    packed: UInt8[Tensor, "tiles chunks bytes"],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """
    Return the weight [out, in] that ``pack`` packed, bit by bit; -0.0 has become 0.0.

    :param shape: [out, in]
    :param dtype: the weight's dtype
    """
    tiles, chunks, _ = packed.shape
    sizes = _sizes(tiles, chunks, dtype)
    lane_first, meta_first = _orders(dtype)
    order = group_order(dtype).to(packed.device)
    kept = ROWS * CHANNELS // 2 * dtype.itemsize
    values = packed[..., :kept].contiguous().view(WORDS[dtype])
    values = _arrange(values.view(_shape(lane_first, sizes)), lane_first, VALUES)
    meta = packed[..., kept:].contiguous().view(_meta_dtype(dtype)).long()
    meta = _arrange(meta.view(_shape(meta_first, sizes)), meta_first, META)
    bits = 4 * torch.arange(order.shape[1] // 2, device=packed.device)
    places = (meta.unsqueeze(-1) >> bits & 15).view(shape[0], chunks, -1)
    seen = expand(values.view(shape[0], chunks, -1, 2), places)
    words = torch.empty_like(seen)
    words[:, :, order.flatten()] = seen
    return words.view(shape).view(dtype)


def expand(
    values: Int[Tensor, "*groups 2"], places: Int[Tensor, "*groups"]
) -> Int[Tensor, "*groups 4"]:
    """
    Put the two kept values of each group at their places among zeros.

    :param places: a group's metadata, see ``CODES``
    """
    both = torch.stack((places & 3, places >> 2 & 3), -1).long()
    return values.new_zeros(*places.shape, 4).scatter_(-1, both, values)


@lru_cache(maxsize=8)
def group_order(dtype: torch.dtype) -> Int[Tensor, "steps groups"]:
    """
    Return which of a chunk's 32 groups the tensor cores see at each place of each step.

    Float8 is multiplied as float16, but read 16 bytes at a time.
    """
    if dtype == torch.int8:
        order = [[16 * s + 4 * lane + word for word in range(4) for lane in range(4)]
                 for s in range(2)]  # fmt: skip
    elif dtype == torch.float8_e4m3fn:
        order = [[16 * (s // 2) + 8 * pair + 4 * (word // 2) + 2 * (s % 2) + word % 2
                  for word in range(4) for pair in range(2)] for s in range(4)]  # fmt: skip
    else:
        order = [[8 * s + 4 * pair + word for word in range(4) for pair in range(2)]
                 for s in range(4)]  # fmt: skip
    return torch.tensor(order)


VALUES = "tile half eight row chunk step high lane group two"
META = "tile half eight row chunk step part"
"""The axes of values and metadata as the weight has them. Rows: tile, half of 16, upper or
lower 8, row; groups: high or low, lane, the rest."""


def _orders(dtype: torch.dtype) -> tuple[str, str]:
    """Return the same axes in the order of the lanes: of the values, of the metadata."""
    if dtype == torch.int8:
        meta = "tile chunk row part eight step half"
    else:
        meta = "tile chunk row half part step eight"
    if dtype == torch.float8_e4m3fn:
        return "tile chunk step row lane half high eight group two", meta
    return "tile chunk step half row lane high eight group two", meta


def _sizes(tiles: int, chunks: int, dtype: torch.dtype) -> dict[str, int]:
    steps, groups = group_order(dtype).shape
    twos = dict.fromkeys(("half", "eight", "high", "two", "part"), 2)
    of = {"tile": tiles, "chunk": chunks, "step": steps, "group": groups // 8}
    return {**twos, **of, "row": 8, "lane": 4}


def _shape(names: str, sizes: dict[str, int]) -> list[int]:
    return [sizes[name] for name in names.split()]


def _meta_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.int8 else torch.int16


def _arrange(tensor: Tensor, given: str, wanted: str) -> Tensor:
    """Permute the axes, which are named by words; the result is contiguous."""
    names = given.split()
    return tensor.permute([names.index(name) for name in wanted.split()]).contiguous()


def _as_bytes(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Store unsigned numbers in the bytes of a signed integer type of their width."""
    width = torch.iinfo(dtype).bits
    signed = torch.where(numbers >= 1 << (width - 1), numbers - (1 << width), numbers)
    return signed.to(dtype).view(torch.uint8)
