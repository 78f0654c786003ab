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
    # rows: tile, half of 16, upper or lower 8, row; groups: high or low, lane, the rest
    values = values.view(tiles, 2, 2, 8, chunks, steps, 2, 4, groups // 8, 2)
    lane_first = "tile chunk step half row lane high eight group two"
    if weight.dtype == torch.float8_e4m3fn:
        lane_first = "tile chunk step row lane half high eight group two"
    given = "tile half eight row chunk step high lane group two"
    values = _arrange(values, given, lane_first)
    bits = 4 * torch.arange(groups // 2, device=weight.device)
    meta = (places.view(tiles, 2, 2, 8, chunks, steps, 2, -1) << bits).sum(-1)
    given = "tile half eight row chunk step part"
    if weight.dtype == torch.int8:
        meta = _arrange(meta, given, "tile chunk row part eight step half")
        meta = _as_bytes(meta, torch.int32)
    else:
        meta = _arrange(meta, given, "tile chunk row half part step eight")
        meta = _as_bytes(meta, torch.int16)
    chunked = values.reshape(tiles, chunks, -1).view(torch.uint8)
    return torch.cat((chunked, meta.view(tiles, chunks, -1)), -1)


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


def _arrange(tensor: Tensor, given: str, wanted: str) -> Tensor:
    """Permute the axes, which are named by words; the result is contiguous."""
    names = given.split()
    return tensor.permute([names.index(name) for name in wanted.split()]).contiguous()


def _as_bytes(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Store unsigned numbers in the bytes of a signed integer type of their width."""
    width = torch.iinfo(dtype).bits
    signed = torch.where(numbers >= 1 << (width - 1), numbers - (1 << width), numbers)
    return signed.to(dtype).view(torch.uint8)
