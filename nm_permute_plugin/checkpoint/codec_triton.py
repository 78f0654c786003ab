# SPDX-License-Identifier: Apache-2.0
"""Do the passes of ``codec`` in Triton, each in one pass over memory; needs Triton."""

import torch
import triton
import triton.language as tl
from jaxtyping import Int, UInt8
from torch import Tensor

from nm_permute_plugin.checkpoint.layout24 import STORED

OCTETS = 512
"""A program handles this many octets of weights, several for each of its threads."""

CHOICES = sum(bits << 4 * i for i, bits in enumerate(STORED))
"""Holds ``STORED`` as one number, with four bits for each entry."""

PAIRS = sum(1 << bits for bits in range(16) if bits.bit_count() == 2)
"""Has bit i set where i, as a bitmask of four weights, has exactly two bits set."""


@triton.jit
def octets_of(octets, columns, bytes_a_row, HALF: tl.constexpr, OCTETS: tl.constexpr):
    """
    The octets of a program: their numbers, if they exist, where their weights begin and
    how many those are.
    """
    octet = tl.program_id(0).to(tl.int64) * OCTETS + tl.arange(0, OCTETS)
    start, size = octet * 8, tl.full((OCTETS,), 8, tl.int64)
    if HALF:
        first = octet % bytes_a_row * 8
        start = octet // bytes_a_row * columns + first
        size = tl.minimum(columns - first, 8)
    return octet, octet < octets, start, size


@triton.jit
def lanes_of(exists, start, size, HALF: tl.constexpr, LANES: tl.constexpr):
    """Returns the offsets of LANES neighbours from each start, and if they exist."""
    lane = tl.arange(0, LANES)[None, :]
    inside = exists[:, None]
    if HALF:
        inside = inside & (lane < size[:, None])
    return start[:, None] + lane, inside


@triton.jit
def compress_kernel(
    words,  # intN [rows, columns]
    values,  # intN [rows, columns / 2]
    bitmask,  # uint8 [rows, bytes_a_row]
    refused,  # int32 [1], set to 1 if more than two of any four weights have bits
    octets,  # bytes of the bitmask
    columns,
    bytes_a_row,
    TABLE: tl.constexpr,  # CHOICES
    HALF: tl.constexpr,  # the last octet of each row has only four weights
    OCTETS: tl.constexpr,
):
    """Fills in values and bits of ``OCTETS`` octets."""
    octet, exists, start, size = octets_of(octets, columns, bytes_a_row, HALF, OCTETS)
    at, inside = lanes_of(exists, start, size, HALF, 8)
    tile = tl.load(words + at, mask=inside, other=0)
    even, odd = tl.split(tl.reshape(tile, (OCTETS, 2, 2, 2)))
    a, c = tl.split(even)  # the first and third of each four: [OCTETS, 2]
    b, d = tl.split(odd)
    bits = (a != 0).to(tl.int64) | ((b != 0).to(tl.int64) << 1)
    bits |= ((c != 0).to(tl.int64) << 2) | ((d != 0).to(tl.int64) << 3)
    stored = (tl.full((OCTETS, 2), TABLE, tl.int64) >> (4 * bits)) & 15
    first = tl.where((stored & 1) != 0, a, tl.where((stored & 2) != 0, b, c))
    second = tl.where((stored & 8) != 0, d, tl.where((stored & 4) != 0, c, b))
    low, high = tl.split(stored)
    tl.store(refused + octet * 0, 1, mask=exists & ((low == 0) | (high == 0)))
    if HALF:
        high = tl.where(size == 8, high, 0)
    tl.store(bitmask + octet, (low | (high << 4)).to(tl.uint8), mask=exists)
    at, inside = lanes_of(exists, start // 2, size // 2, HALF, 4)
    pairs = tl.reshape(tl.join(first, second), (OCTETS, 4))
    tl.store(values + at, pairs, mask=inside)


@triton.jit
def decompress_kernel(
    words,  # intN [rows, columns]
    values,  # intN [rows, columns / 2]
    bitmask,  # uint8 [rows, bytes_a_row]
    refused,  # int32 [1], set to 1 if not two bits of any four are set
    octets,  # bytes of the bitmask
    columns,
    bytes_a_row,
    TABLE: tl.constexpr,  # PAIRS
    HALF: tl.constexpr,  # the last octet of each row has only four weights
    OCTETS: tl.constexpr,
):
    """Fills in the weights of ``OCTETS`` octets."""
    octet, exists, start, size = octets_of(octets, columns, bytes_a_row, HALF, OCTETS)
    byte = tl.load(bitmask + octet, mask=exists, other=0).to(tl.int32)
    low, high = byte & 15, byte >> 4
    of_low, of_high = (TABLE >> low) & 1, (TABLE >> high) & 1
    if HALF:
        of_high = tl.where(size == 8, of_high, (high == 0).to(tl.int32))
    tl.store(refused + octet * 0, 1, mask=exists & ((of_low & of_high) == 0))
    at, inside = lanes_of(exists, start // 2, size // 2, HALF, 4)
    tile = tl.load(values + at, mask=inside, other=0)
    first, second = tl.split(tl.reshape(tile, (OCTETS, 2, 2)))
    bits = tl.join(low, high)
    none = tl.zeros_like(first)
    a = tl.where((bits & 1) != 0, first, none)
    b = tl.where((bits & 2) != 0, tl.where((bits & 1) != 0, second, first), none)
    c = tl.where((bits & 4) != 0, tl.where((bits & 8) != 0, first, second), none)
    d = tl.where((bits & 8) != 0, second, none)
    eight = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (OCTETS, 8))
    at, inside = lanes_of(exists, start, size, HALF, 8)
    tl.store(words + at, eight, mask=inside)


def compress_in_triton(
    words: Int[Tensor, "rows columns"],
) -> tuple[Int[Tensor, "rows half"], UInt8[Tensor, "rows bytes"]] | None:
    """
    What is stored of a weight's bits, or None if it is not 2:4.

    :param words: contiguous and not empty, as in the next
    """
    rows, columns = words.shape
    values = words.new_empty(rows, columns // 2)
    bitmask = words.new_empty(rows, -(-columns // 8), dtype=torch.uint8)
    good = _run(compress_kernel, words, values, bitmask, CHOICES)
    return (values, bitmask) if good else None


def decompress_in_triton(
    values: Int[Tensor, "rows half"], bitmask: UInt8[Tensor, "rows bytes"], columns: int
) -> Int[Tensor, "rows columns"] | None:
    """Returns the bits of a weight, or None unless two of any four bits are set."""
    words = values.new_empty(len(values), columns)
    good = _run(decompress_kernel, words, values, bitmask, PAIRS)
    return words if good else None


def _run(kernel, words, values, bitmask, table) -> bool:
    """Runs over all octets on the tensors' device; False if the kernel refused one."""
    octets, columns = bitmask.numel(), words.shape[1]
    refused = torch.zeros(1, dtype=torch.int32, device=words.device)
    with torch.cuda.device_of(words):
        kernel[(triton.cdiv(octets, OCTETS),)](
            words,
            values,
            bitmask,
            refused,
            octets,
            columns,
            bitmask.shape[1],
            TABLE=table,
            HALF=columns % 8 != 0,
            OCTETS=OCTETS,
        )
    return not bool(refused)
