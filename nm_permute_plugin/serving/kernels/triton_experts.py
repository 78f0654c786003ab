# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ``experts.py``; importing it needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nm_permute_plugin.serving.kernels.experts import StoredExperts


@triton.jit
def weight_at(low, high, nibble, place: tl.constexpr):
    """
    Return the bits of each group's weight at one of its four places, 0 where none is kept.

    :param low: the first kept weight of a group
    :param high: the second
    :param nibble: the group's four bits of the bitmask, of which two are set
    """
    word = low
    if place == 3:
        word = high
    elif place > 0:
        word = tl.where((nibble & ((1 << place) - 1)) == 0, low, high)
    return tl.where((nibble & (1 << place)) != 0, word, 0)


@triton.jit
def side_by_side(low, high, nibble):
    """Return the bits of all weights [rows, 4 * groups] of groups [rows, groups]."""
    even = tl.join(weight_at(low, high, nibble, 0), weight_at(low, high, nibble, 2))
    odd = tl.join(weight_at(low, high, nibble, 1), weight_at(low, high, nibble, 3))
    whole = tl.join(even, odd)
    return tl.reshape(whole, (low.shape[0], 4 * low.shape[1]))


@triton.jit
def load_groups(values, bits, row, group, inside, TOTAL: tl.constexpr):
    """Load both kept weights and the four bits of groups [rows, groups]."""
    word = tl.load(values + row[:, None] * TOTAL + group[None, :], inside, 0)
    at = bits + row[:, None] * (TOTAL // 2) + (group // 2)[None, :]
    byte = tl.load(at, inside, 0).to(tl.int32)
    nibble = (byte >> ((group % 2) * 4)[None, :]) & 15
    return word & 0xFFFF, (word >> 16) & 0xFFFF, nibble


@triton.jit
def experts_kernel(
    values,  # int32 [experts, rows (gate, then up), groups]: the two kept weights
    bits,  # uint8 [experts, rows, groups / 2]: 4 bits a group, their places
    x,  # [tokens or pairs, 4 * groups]
    out,  # [pairs, rows of an output]
    scale,  # float32 [pairs]: routing weights
    pair_of,  # int32 [blocks, TOKENS]: a pair is a token and one of its experts; or -1
    expert_of,  # int32 [blocks]: or -1
    rows,  # of the output
    TOTAL: tl.constexpr,  # groups of a row
    TOP_K: tl.constexpr,  # pairs that share a row of x
    GATED: tl.constexpr,  # the output is silu(gate) * up
    SCALED: tl.constexpr,  # the output is multiplied by the routing weight
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    INTERLEAVE: tl.constexpr,
):
    """
    Compute a tile of ``ROWS`` outputs of a block of pairs that share an expert.

    ``INTERLEAVE``: the weights are put side by side for one product. Else it takes four
    products, one for each place in a group, and the weights stay in the registers that
    they were loaded into.
    """
    block = tl.program_id(0)
    expert = tl.load(expert_of + block)
    if expert < 0:
        return
    pair = tl.load(pair_of + block * TOKENS + tl.arange(0, TOKENS))
    used = pair >= 0
    x_row = tl.where(used, pair, 0) // TOP_K
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    stored_rows = rows * 2 if GATED else rows
    stored = expert.to(tl.int64) * stored_rows + row
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    other = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    begin = x + x_row.to(tl.int64)[None, :] * (4 * TOTAL)
    for start in range(0, TOTAL, GROUPS):
        group = start + tl.arange(0, GROUPS)
        both = inside[:, None] & (group < TOTAL)[None, :]
        low, high, nibble = load_groups(values, bits, stored, group, both, TOTAL)
        if GATED:
            up = stored + rows
            low_up, high_up, nibble_up = load_groups(
                values, bits, up, group, both, TOTAL
            )
        if INTERLEAVE:
            channel = 4 * start + tl.arange(0, 4 * GROUPS)
            mask = used[None, :] & (channel < 4 * TOTAL)[:, None]
            tokens = tl.load(begin + channel[:, None], mask, 0.0)
            weight = side_by_side(low, high, nibble).to(tl.uint16)
            total = tl.dot(weight.to(dtype, bitcast=True), tokens, total)
            if GATED:
                weight = side_by_side(low_up, high_up, nibble_up).to(tl.uint16)
                other = tl.dot(weight.to(dtype, bitcast=True), tokens, other)
        else:
            mask = used[None, :] & (group < TOTAL)[:, None]
            for place in tl.static_range(4):
                tokens = tl.load(begin + (4 * group + place)[:, None], mask, 0.0)
                weight = weight_at(low, high, nibble, place).to(tl.uint16)
                total = tl.dot(weight.to(dtype, bitcast=True), tokens, total)
                if GATED:
                    weight = weight_at(low_up, high_up, nibble_up, place).to(tl.uint16)
                    other = tl.dot(weight.to(dtype, bitcast=True), tokens, other)
    if GATED:
        total = total / (1 + tl.exp(-total)) * other
    if SCALED:
        total = total * tl.load(scale + pair, mask=used, other=0.0)[None, :]
    at = out + pair.to(tl.int64)[None, :] * rows + row[:, None]
    mask = inside[:, None] & used[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def align_kernel(
    ids,  # int32 or int64 [pairs]: the expert of each pair; negative: not on this device
    pair_of,  # int32 [blocks, TOKENS], filled with -1
    expert_of,  # int32 [blocks], filled with -1
    pairs,
    blocks,
    EXPERTS: tl.constexpr,  # a power of two, or more than there are
    PAIRS: tl.constexpr,  # a power of two
    BLOCKS: tl.constexpr,  # a power of two
    TOKENS: tl.constexpr,
):
    """Sort pairs by expert, and give each expert whole blocks of ``TOKENS`` pairs."""
    pair = tl.arange(0, PAIRS)
    expert = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
    every = tl.arange(0, EXPERTS)
    one_hot = (expert[:, None] == every[None, :]).to(tl.int32)
    count = tl.sum(one_hot, 0)
    needed = (count + TOKENS - 1) // TOKENS
    last = tl.cumsum(needed, 0)
    rank = tl.sum(tl.cumsum(one_hot, 0) * one_hot, 1) - 1
    first = tl.sum(one_hot * (last - needed)[None, :], 1)
    at = pair_of + first * TOKENS + rank
    tl.store(at, pair, mask=(pair < pairs) & (expert >= 0))
    block = tl.arange(0, BLOCKS)
    owner = tl.sum((last[None, :] <= block[:, None]).to(tl.int32), 1)
    tl.store(expert_of + block, owner, mask=(block < blocks) & (owner < EXPERTS))


@triton.jit
def expand_kernel(
    values,  # int32 [groups]
    bits,  # uint8 [groups / 2]
    out,  # int16 [4 * groups]
    total,
    GROUPS: tl.constexpr,
):
    """Write the dense weights of ``GROUPS`` groups."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < total
    word = tl.load(values + group, mask=inside, other=0)
    byte = tl.load(bits + group // 2, mask=inside, other=0).to(tl.int32)
    nibble = (byte >> ((group % 2) * 4).to(tl.int32)) & 15
    low, high = word & 0xFFFF, (word >> 16) & 0xFFFF
    even = tl.join(weight_at(low, high, nibble, 0), weight_at(low, high, nibble, 2))
    odd = tl.join(weight_at(low, high, nibble, 1), weight_at(low, high, nibble, 3))
    whole = tl.reshape(tl.join(even, odd), (4 * GROUPS,)).to(tl.int16)
    channel = tl.program_id(0).to(tl.int64) * (4 * GROUPS) + tl.arange(0, 4 * GROUPS)
    tl.store(out + channel, whole, mask=channel < 4 * total)


def product(
    x: Tensor,
    weight: StoredExperts,
    blocks: tuple[Tensor, Tensor],
    out: Tensor,
    scale: Tensor | None,
    top_k: int,
    tile: tuple[int, int, int, int, int],
) -> None:
    """
    Multiply every pair by its expert's weight, into ``out``.

    :param x: [tokens, in], 16-bit; a token's ``top_k`` pairs share its row
    :param weight: [experts, rows, in]
    :param blocks: int32 [blocks, pairs of a block] and [blocks]: see ``align_kernel``
    :param out: [pairs, rows]; or with half as many rows, of silu(first half) * second half
    :param scale: float32 [pairs], multiplied into the outputs; None for none
    :param tile: rows, groups, whether to interleave, warps, pipeline stages
    """
    pair_of, expert_of = blocks
    rows, groups, interleave, warps, stages = tile
    experts_kernel[(len(expert_of), triton.cdiv(out.shape[1], rows))](
        weight.values.view(torch.int32),
        weight.bits,
        x,
        out,
        out if scale is None else scale,
        pair_of,
        expert_of,
        out.shape[1],
        TOTAL=x.shape[1] // 4,
        TOP_K=top_k,
        GATED=weight.values.shape[1] == 2 * out.shape[1],
        SCALED=scale is not None,
        TOKENS=pair_of.shape[1],
        ROWS=rows,
        GROUPS=groups,
        INTERLEAVE=bool(interleave),
        num_warps=warps,
        num_stages=stages,
    )


def align(ids: Tensor, experts: int, pair_of: Tensor, expert_of: Tensor) -> None:
    """
    Fill in the pairs and the expert of every block; both tensors are filled with -1.

    :param ids: [pairs], the expert of each
    """
    blocks, tokens = pair_of.shape
    align_kernel[(1,)](
        ids,
        pair_of,
        expert_of,
        len(ids),
        blocks,
        EXPERTS=triton.next_power_of_2(experts),
        PAIRS=triton.next_power_of_2(len(ids)),
        BLOCKS=triton.next_power_of_2(blocks),
        TOKENS=tokens,
        num_warps=8,
    )


def expand(weight: StoredExperts, out: Tensor, groups: int = 1024) -> None:
    """
    Write the dense weights [experts, rows, in] into ``out``.

    :param groups: of a program
    """
    words = weight.values.view(torch.int32)
    expand_kernel[(triton.cdiv(words.numel(), groups),)](
        words, weight.bits, out.view(torch.int16), words.numel(), GROUPS=groups
    )
