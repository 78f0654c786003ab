# SPDX-License-Identifier: Apache-2.0
"""
Multiplies tokens by the 2:4 weights of their routed experts, read as they are stored.

Decoding reads the weights of a few experts once for few tokens: its time is the bytes.
Values and bitmask are 0.5625 of a dense weight's, and are expanded in registers.
"""

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.kernel import (
    DTYPES_16,
    Settings,
    runs_triton,
    unsupported_dtype,
)

_MOST_PAIRS = 512
"""So many pairs of a token and an expert one program of ours sorts; torch sorts more."""

_FEW, _MANY = 16, 64
"""Pairs of a block: the least that tensor cores multiply, and for prompts."""


@dataclass(frozen=True)
class StoredExperts:
    """
    A weight of all experts, as a checkpoint stores it, stacked.

    :param values: [experts, out, in / 2], the two kept weights of every four
    :param bits: uint8 [experts, out, in / 8], a bit for every weight, the lowest first
    """

    values: Tensor
    bits: Tensor

    @property
    def dense_shape(self) -> tuple[int, int, int]:
        """The shape of the dense weight: [experts, out, in]."""
        experts, rows, half = self.values.shape
        return experts, rows, 2 * half

    @runs_triton
    def expand(self, out: Tensor) -> Tensor:
        """
        Write the dense weight into ``out``, on a GPU, and return it.

        :param out: [experts, out, in], of the values' dtype
        :raises RuntimeError: if Triton or the card refuses
        """
        from nm_permute_plugin.serving.kernels.triton_experts import expand

        expand(self, out)
        return out


def unsupported(up: StoredExperts, down: StoredExperts) -> str | None:
    """Return why the kernel cannot multiply by these weights; None if it can."""
    if reason := unsupported_dtype(up.values.dtype, DTYPES_16):
        return reason
    if not up.values.is_cuda:
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    for weight in (up, down):
        channels = weight.dense_shape[2]
        if channels % 8:
            return f"{channels} channels are no multiple of 8"
    return None


def candidates(tokens: int, top_k: int, experts: int) -> list[Settings]:
    """
    List the settings worth measuring for so many tokens.

    Each has the pairs of a block; then rows and groups of a tile of the first product, and
    of the second; whether weights are interleaved; warps; and pipeline stages.
    """
    decode: list[Settings] = [
        (_FEW, 16, 64, 32, 64, 0, 4, 3),
        (_FEW, 32, 32, 32, 32, 0, 4, 4),
        (_FEW, 32, 64, 64, 32, 0, 4, 3),
        (_FEW, 32, 32, 64, 32, 1, 4, 4),
        (_FEW, 64, 16, 64, 16, 1, 4, 4),
    ]
    prompts: list[Settings] = [
        (_MANY, 64, 16, 64, 16, 1, 4, 3),
        (_MANY, 64, 16, 128, 16, 1, 8, 3),
        (2 * _MANY, 64, 16, 128, 16, 1, 8, 3),
    ]
    if tokens * top_k <= 2 * experts:  # so few that most blocks hold one pair or two
        return decode
    return decode[2:] + prompts


@runs_triton
def run(
    x: Tensor,
    up: StoredExperts,
    down: StoredExperts,
    topk_weights: Tensor,
    topk_ids: Tensor,
    settings: Settings,
    expert_map: Tensor | None = None,
) -> Tensor:
    """
    Compute the weighted sum of each token's experts, ``down(silu(gate(x)) * up(x))``.

    :param x: [tokens, hidden], of the weights' dtype
    :param up: [experts, 2 * inner, hidden]: gates, then ups
    :param down: [experts, hidden, inner]
    :param topk_weights: [tokens, k], what each expert's output is multiplied by
    :param topk_ids: [tokens, k], which experts
    :param settings: one of ``candidates``
    :param expert_map: [all experts], the places of those on this device in the weights, -1
        for others, whose outputs count as zero; None if all are here
    :return: [tokens, hidden]
    :raises RuntimeError: if Triton or the card refuses
    """
    from nm_permute_plugin.serving.kernels.triton_experts import product

    tokens, top_k = topk_ids.shape
    if not tokens:
        return torch.empty_like(x)
    block, up_rows, up_groups, down_rows, down_groups, *more = settings
    interleave, warps, stages = more
    ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
    experts, stored_rows, hidden = up.dense_shape
    blocks = align(ids.flatten(), experts, block)
    inner = x.new_empty(tokens * top_k, stored_rows // 2)
    out = (x.new_empty if expert_map is None else x.new_zeros)(tokens * top_k, hidden)
    scale = topk_weights.float().flatten()
    tile = (up_rows, up_groups, interleave, warps, stages)
    product(x.contiguous(), up, blocks, inner, None, top_k, tile)
    tile = (down_rows, down_groups, interleave, warps, stages)
    product(inner, down, blocks, out, scale, 1, tile)
    return out.view(tokens, top_k, hidden).sum(1)


def align(ids: Tensor, experts: int, size: int) -> tuple[Tensor, Tensor]:
    """
    Sort pairs by expert into blocks of which each has one expert.

    Shapes depend on the number of pairs only, as a CUDA graph needs it.

    :param ids: [pairs], the expert of each pair; negative: none of this device
    :param size: pairs of a block
    :return: int32 [blocks, size], the pairs of each block, or -1; int32 [blocks], the
        expert of each, or -1
    """
    pairs = len(ids)
    blocks = min(pairs, min(pairs, experts) + pairs // size)
    both = torch.full((blocks * (size + 1),), -1, dtype=torch.int32, device=ids.device)
    pair_of, expert_of = both[: blocks * size].view(blocks, size), both[blocks * size :]
    if pairs <= _MOST_PAIRS:
        from nm_permute_plugin.serving.kernels import triton_experts

        triton_experts.align(ids, experts, pair_of, expert_of)
        return pair_of, expert_of
    _align_in_torch(ids.long(), experts, pair_of, expert_of)
    return pair_of, expert_of


def _align_in_torch(
    ids: Tensor, experts: int, pair_of: Tensor, expert_of: Tensor
) -> None:
    """Do what ``triton_experts.align`` does, for any number of pairs."""
    blocks, size = pair_of.shape
    ids = torch.where(ids < 0, experts, ids)  # those of other devices go last
    ordered, pair = ids.sort(stable=True)
    count = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
    count.scatter_add_(0, ids, torch.ones_like(ids))
    needed = (count + size - 1) // size
    last, before = needed.cumsum(0), count.cumsum(0) - count
    rank = torch.arange(len(ids), device=ids.device) - before[ordered]
    place = (last - needed)[ordered] * size + rank
    # room for the pairs of other devices, which no block takes
    room = torch.full(
        (blocks * size + len(ids) + size,), -1, dtype=torch.int32, device=ids.device
    )
    room.scatter_(0, place, pair.to(torch.int32))
    number = torch.arange(blocks, device=ids.device)
    owner = torch.searchsorted(last[:-1].contiguous(), number, right=True)
    expert_of.copy_(torch.where(owner < experts, owner, -1))
    mine = (owner < experts)[:, None]
    pair_of.copy_(torch.where(mine, room[: blocks * size].view(blocks, size), -1))
