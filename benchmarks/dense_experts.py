# SPDX-License-Identifier: Apache-2.0
"""The dense counterpart of our kernel of routed experts, of the same structure."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CANDIDATES = [
    # pairs of a block; rows and channels of a tile; warps; stages
    (16, 16, 256, 4, 3),
    (16, 32, 128, 4, 4),
    (16, 32, 256, 4, 3),
    (16, 64, 128, 4, 3),
    (64, 64, 64, 4, 3),
    (64, 128, 64, 8, 3),
    (128, 128, 64, 8, 3),
]
"""Settings that are timed; those for prompts also serve few tokens, slowly."""


_ONE_HOT = 1 << 15
"""A sort looks at so many pairs times experts at once: more do not fit shared memory."""


@triton.jit
def dense_kernel(
    weights,  # [experts, rows (gate, then up), channels]
    x,  # [tokens or pairs, channels]
    out,  # [pairs, rows of an output]
    scale,  # float32 [pairs]
    pair_of,  # int32 [blocks, TOKENS]
    expert_of,  # int32 [blocks]
    rows,
    TOTAL: tl.constexpr,  # channels
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute a tile of ``ROWS`` outputs of a block of pairs that share an expert."""
    block = tl.program_id(0)
    expert = tl.load(expert_of + block)
    if expert < 0:
        return
    pair = tl.load(pair_of + block * TOKENS + tl.arange(0, TOKENS))
    used = pair >= 0
    x_row = tl.where(used, pair, 0) // TOP_K
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    stored = expert.to(tl.int64) * (rows * 2 if GATED else rows) + row
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    other = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    begin = x + x_row.to(tl.int64)[None, :] * TOTAL
    for start in range(0, TOTAL, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        known = channel < TOTAL
        mask = inside[:, None] & known[None, :]
        at = weights + stored[:, None] * TOTAL + channel[None, :]
        tokens = tl.load(begin + channel[:, None], used[None, :] & known[:, None], 0.0)
        total = tl.dot(tl.load(at, mask, 0.0), tokens, total)
        if GATED:
            other = tl.dot(tl.load(at + rows * TOTAL, mask, 0.0), tokens, other)
    if GATED:
        total = total / (1 + tl.exp(-total)) * other
    if SCALED:
        total = total * tl.load(scale + pair, mask=used, other=0.0)[None, :]
    at = out + pair.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), inside[:, None] & used[None, :])


@triton.jit
def align_kernel(
    ids,  # int32 or int64 [pairs]: the expert of each pair; negative: not on this device
    pair_of,  # int32 [blocks, TOKENS], filled with -1
    expert_of,  # int32 [blocks], filled with -1
    pairs,
    EXPERTS: tl.constexpr,  # a power of two
    PART: tl.constexpr,  # experts at a time, a power of two
    PAIRS: tl.constexpr,  # a power of two
    BLOCKS: tl.constexpr,  # a power of two
    TOKENS: tl.constexpr,
):
    """Sort pairs by expert, and give each expert whole blocks of ``TOKENS`` pairs."""
    pair, block = tl.arange(0, PAIRS), tl.arange(0, BLOCKS)
    expert = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
    given = 0  # blocks of the experts before
    for start in range(0, EXPERTS, PART):
        every = start + tl.arange(0, PART)
        one_hot = (expert[:, None] == every[None, :]).to(tl.int32)
        needed = (tl.sum(one_hot, 0) + TOKENS - 1) // TOKENS
        last = given + tl.cumsum(needed, 0)
        rank = tl.sum(tl.cumsum(one_hot, 0) * one_hot, 1) - 1
        first = tl.sum(one_hot * (last - needed)[None, :], 1)
        at = pair_of + first * TOKENS + rank
        tl.store(at, pair, mask=tl.sum(one_hot, 1) > 0)
        owner = start + tl.sum((last[None, :] <= block[:, None]).to(tl.int32), 1)
        end = given + tl.sum(needed, 0)
        tl.store(expert_of + block, owner, mask=(block >= given) & (block < end))
        given = end


def align(ids: Tensor, experts: int, size: int) -> tuple[Tensor, Tensor]:
    """
    Sort pairs by expert into blocks of which each has one expert.

    :param ids: [pairs], the expert of each pair, of which there are at most some hundreds
    :param size: pairs of a block
    :return: int32 [blocks, size], the pairs of each block, or -1; int32 [blocks], the
        expert of each, or -1
    """
    pairs = len(ids)
    blocks = min(pairs, min(pairs, experts) + pairs // size)
    both = torch.full((blocks * (size + 1),), -1, dtype=torch.int32, device=ids.device)
    pair_of, expert_of = both[: blocks * size].view(blocks, size), both[blocks * size :]
    every, room = triton.next_power_of_2(experts), triton.next_power_of_2(pairs)
    align_kernel[(1,)](
        ids,
        pair_of,
        expert_of,
        pairs,
        EXPERTS=every,
        PART=min(every, _ONE_HOT // room),
        PAIRS=room,
        BLOCKS=triton.next_power_of_2(blocks),
        TOKENS=size,
        num_warps=8,
    )
    return pair_of, expert_of


def run(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    settings: tuple[int, ...],
) -> Tensor:
    """
    Compute the weighted sum of each token's experts.

    :param x: [tokens, hidden]
    :param up: [experts, 2 * inner, hidden]: gates, then ups
    :param down: [experts, hidden, inner]
    :param settings: one of ``CANDIDATES``
    :return: [tokens, hidden]
    """
    size, rows, channels, warps, stages = settings
    (tokens, top_k), hidden = topk_ids.shape, down.shape[1]
    pair_of, expert_of = align(topk_ids.flatten(), len(up), size)
    inner = x.new_empty(tokens * top_k, up.shape[1] // 2)
    out = x.new_empty(tokens * top_k, hidden)
    scale = topk_weights.float().flatten()
    for weights, source, target in ((up, x, inner), (down, inner, out)):
        dense_kernel[(len(expert_of), triton.cdiv(target.shape[1], rows))](
            weights,
            source,
            target,
            scale,
            pair_of,
            expert_of,
            target.shape[1],
            TOTAL=weights.shape[2],
            TOP_K=top_k if weights is up else 1,
            GATED=weights is up,
            SCALED=weights is down,
            TOKENS=size,
            ROWS=rows,
            CHANNELS=channels,
            num_warps=warps,
            num_stages=stages,
        )
    return out.view(tokens, top_k, hidden).sum(1)
