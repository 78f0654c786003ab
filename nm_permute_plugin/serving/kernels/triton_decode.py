# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of ``triton_fallback.py``; importing it needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def decode_kernel(
    values,  # int32 [rows, words]: the two kept 16-bit weights of a group
    codes,  # uint8 [rows, bytes]: 4 bits a group, their places
    x,  # [tokens, 4 * groups]
    out,  # [tokens, rows]
    tokens,
    rows,
    words,
    bytes_a_row,
    TOTAL: tl.constexpr,  # groups of a row
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """
    Compute a tile of ``ROWS`` outputs of all tokens.

    It adds up four small products, one for each place in a group of four channels: the
    weights at that place by the tokens' channels there. Nothing is interleaved, so that
    the weights stay in the registers that they were loaded into.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    inside = row < rows
    for start in range(0, TOTAL, GROUPS):
        group = start + tl.arange(0, GROUPS)
        both = inside[:, None] & (group < TOTAL)[None, :]
        word = tl.load(
            values + row[:, None] * words + group[None, :], mask=both, other=0
        )
        code = tl.load(
            codes + row[:, None] * bytes_a_row + (group // 2)[None, :],
            mask=both,
            other=0,
        )
        code = code.to(tl.int32) >> ((group % 2) * 4)[None, :]
        first, second = code & 3, (code >> 2) & 3
        low, high = word & 0xFFFF, (word >> 16) & 0xFFFF
        for place in tl.static_range(4):
            bits = tl.where(first == place, low, 0) | tl.where(second == place, high, 0)
            weight = bits.to(tl.uint16).to(x.dtype.element_ty, bitcast=True)
            at = x + token[None, :] * (4 * TOTAL) + (4 * group + place)[:, None]
            mask = (token < tokens)[None, :] & (group < TOTAL)[:, None]
            total = tl.dot(weight, tl.load(at, mask=mask, other=0.0), total)
    at = out + token[None, :] * rows + row[:, None]
    mask = inside[:, None] & (token < tokens)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=mask)


def decode(
    packed: Tensor, x: Tensor, out_features: int, settings: tuple[int, ...]
) -> Tensor:
    """
    Multiply by a weight of ``TritonDecode.prepare``: [tokens, out_features].

    :param packed: uint8 [rows, bytes]: in each row the kept values, then their places
    :param x: [tokens, in], 16-bit
    :param settings: rows and groups of a tile, warps, pipeline stages
    """
    rows, groups, warps, stages = settings
    tokens, channels = x.shape
    out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    values = packed[:, :channels].view(torch.int32)
    decode_kernel[(triton.cdiv(out_features, rows),)](
        values,
        packed[:, channels:],
        x.contiguous(),
        out,
        tokens,
        out_features,
        values.stride(0),
        packed.stride(0),
        TOTAL=channels // 4,
        TOKENS=max(16, triton.next_power_of_2(tokens)),
        ROWS=rows,
        GROUPS=groups,
        num_warps=warps,
        num_stages=stages,
    )
    return out
