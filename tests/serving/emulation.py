# SPDX-License-Identifier: Apache-2.0
"""
What a warp computes with packed weights, lane by lane, as the PTX manual defines it.

Written from the manual's sections on ``mma.sp`` (fragments of A, B and C, metadata,
sparsity selector) and from ``sparse24.cu``'s loads; it shares no code with the packing.
"""

import torch
from torch import Tensor

LANES = torch.arange(32)
GROUP, QUARTER = LANES // 4, LANES % 4


def multiply(packed: Tensor, x: Tensor, rows: int) -> Tensor:
    """
    [tokens, rows] in float64.

    :param packed: uint8 [rows / 32, chunks, bytes]
    :param x: [tokens, channels], of the weight's dtype, at most 8 tokens
    """
    tokens = len(x)
    padded = torch.cat([x[min(token, tokens - 1)][None] for token in range(8)])
    out = torch.zeros(rows, 8, dtype=torch.float64)
    for tile, chunks in enumerate(packed):
        for chunk, data in enumerate(chunks):
            channels = padded[:, 128 * chunk : 128 * chunk + 128].contiguous()
            for half in (0, 1):
                at = 32 * tile + 16 * half
                out[at : at + 16] += _sixteen_rows(
                    data.view(-1, 32, 16), channels, half
                )
    return out[:, :tokens].t()


def _sixteen_rows(pieces: Tensor, x: Tensor, half: int) -> Tensor:
    """[16, 8]: half a tile by one chunk's channels."""
    dtype, steps = x.dtype, 2 if x.dtype == torch.int8 else 4
    out = torch.zeros(16, 8, dtype=torch.float64)
    words = pieces[-1].contiguous().view(torch.int32).long() & 0xFFFFFFFF  # [lane, 4]
    for step in range(steps):
        if dtype == torch.float8_e4m3fn:
            eight = pieces[step, :, 8 * half : 8 * half + 8].contiguous()
            a = eight.view(dtype).double().view(32, 4, 2)
        else:
            a = (
                pieces[2 * step + half]
                .contiguous()
                .view(dtype)
                .double()
                .view(32, 4, -1)
            )
        meta = words[:, 2 * step + half if dtype == torch.int8 else step]
        dense = _sparse_operand(a, meta, half)
        out += dense @ _token_operand(x, step)
    return out


def _sparse_operand(a: Tensor, meta: Tensor, selector: int) -> Tensor:
    """[16, k]: the dense matrix that four registers a lane and metadata stand for."""
    width = a.shape[-1]  # values in a register
    kept = torch.zeros(16, 8 * width, dtype=torch.float64)
    for register in range(4):
        for value in range(width):
            row = GROUP + 8 * (register % 2)
            column = QUARTER * width + value + 4 * width * (register // 2)
            kept[row, column] = a[:, register, value]
    dense = torch.zeros(16, 16 * width, dtype=torch.float64)
    groups = 4 * width
    for row in range(16):
        for group in range(groups):
            if width == 2:  # 16 bits a row in each of two lanes
                lane = 4 * (row % 8) + 2 * selector + group // 4
                bits = int(meta[lane]) >> 16 * (row // 8) >> 4 * (group % 4)
            else:  # 32 bits a row in each of two lanes
                lane = 4 * (row % 8) + 2 * (group // 8) + row // 8
                bits = int(meta[lane]) >> 4 * (group % 8)
            first, second = bits & 3, bits >> 2 & 3
            assert first < second, "the hardware wants places in order"
            dense[row, 4 * group + first] = kept[row, 2 * group]
            dense[row, 4 * group + second] = kept[row, 2 * group + 1]
    return dense


def _token_operand(x: Tensor, step: int) -> Tensor:
    """[k, 8]: what the lanes hold after loading their bytes and swapping halves."""
    width = 4 if x.dtype == torch.int8 else 2
    registers = torch.stack([_registers(x, step, int(lane)) for lane in LANES])
    operand = torch.zeros(16 * width, 8, dtype=torch.float64)
    for register in range(4):
        for value in range(width):
            operand[QUARTER * width + value + 4 * width * register, GROUP] = registers[
                :, register, value
            ]
    return operand


def _registers(x: Tensor, step: int, lane: int) -> Tensor:
    """[4, values]: a lane's registers; its token is the row of x, of 128 channels."""
    if x.dtype == torch.int8:
        at = 64 * step + 16 * (lane % 4)
        return x[lane // 4, at : at + 16].double().view(4, 4)
    own, other = _halves(x, step, lane), _halves(x, step, lane ^ 1)
    odd = lane % 2  # even lanes keep first halves of groups, odd ones second halves
    pair = (other, own) if odd else (own, other)
    return torch.cat([half[:, odd] for half in pair])


def _halves(x: Tensor, step: int, lane: int) -> Tensor:
    """[group, half, 2]: the two groups of channels that a lane itself reads."""
    if x.dtype == torch.float8_e4m3fn:
        at = 64 * (step // 2) + 16 * (lane % 4) + 8 * (step % 2)
    else:
        at = 32 * step + 8 * (lane % 4)
    return x[lane // 4, at : at + 8].double().view(2, 2, 2)
