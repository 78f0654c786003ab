# SPDX-License-Identifier: Apache-2.0
"""N:M masks, ``score_gradient`` and ``move_costs`` in Triton; import it with Triton."""

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nm_permute_plugin.maths.mask_gradients import SOFTNESS
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation

PROGRAMS = 4096
"""Programs that fill a GPU; each sums a share of the rows of some channels."""

FEWEST_ROWS = 8
"""Rows of a share at least: every share writes its sums out, so short ones do not pay."""

TILE_GROUPS = 16
"""Groups of M channels whose score gradients one program sums."""

SUMS_OF_A_WARP = 512
"""Sums, channels times groups, that the registers of a warp hold for the costs of moves."""

PAIRS = 128
"""Pairs of a row and a group for which one program makes the mask."""


@triton.jit
def ranks_of(score, member):
    """
    The place of each score in its group, 0 for the largest; of equals the first leads.
    """
    others, own = score[:, :, None], score[:, None, :]
    earlier = member[:, None] < member[None, :]
    leads = (others > own) | ((others == own) & earlier[None, :, :])
    return tl.sum(leads.to(tl.int32), axis=1)


@triton.jit
def load_scores(score, factor, from_row, from_factor, channel, is_member):
    """The scores of the members of groups, times their factors; -1 beside a group."""
    found = tl.load(score + from_row + channel, mask=is_member, other=-1.0)
    scale = tl.load(factor + from_factor + channel, mask=is_member, other=1.0)
    return found.to(tl.float32) * scale


@triton.jit
def masks_kernel(
    score,  # float32 [rows, width]
    factor,  # float32 [row groups, width]
    perm,  # int64 [width], the channels group by group
    out,  # uint8 [rows, width]
    pairs,  # rows times groups
    groups,
    width,
    rows_per_group,
    N: tl.constexpr,
    M: tl.constexpr,
    MEMBERS: tl.constexpr,  # the next power of two of M
    PAIRS: tl.constexpr,
):
    """1 where a score is among the top N of its group."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    row, group = pair // groups, pair % groups
    member = tl.arange(0, MEMBERS)
    is_member = (pair < pairs)[:, None] & (member < M)[None, :]
    channel = tl.load(
        perm + (group * M)[:, None] + member[None, :], mask=is_member, other=0
    )
    from_row = (row * width)[:, None]
    from_factor = (row // rows_per_group * width)[:, None]
    scores = load_scores(score, factor, from_row, from_factor, channel, is_member)
    kept = ranks_of(scores, member) < N
    tl.store(out + from_row + channel, kept.to(tl.uint8), mask=is_member)


@triton.jit
def score_gradient_kernel(
    score,  # float32 [rows, width]
    factor,  # float32 [row groups, width]
    grad,  # [rows, width]
    perm,  # int64 [width], the channels group by group
    out,  # float32 [row groups times shares, width]
    groups,
    width,
    row_groups,
    groups_per_part,  # row groups that a program goes through
    shares,  # into which a row group is cut; above 1 only where a part is one row group
    rows_per_share,
    rows_per_group,
    softness,
    tiny,
    N: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """The gradients of log-scores, summed over the rows of each share of a row group."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    part = tl.program_id(1)
    member = tl.arange(0, MEMBERS)
    is_member = (group < groups)[:, None] & (member < M)[None, :]
    channel = tl.load(
        perm + (group * M)[:, None] + member[None, :], mask=is_member, other=0
    )
    share = part % shares
    start = part // shares * groups_per_part
    for row_group in range(start, tl.minimum(start + groups_per_part, row_groups)):
        total = tl.zeros((GROUPS, MEMBERS), dtype=tl.float32)
        from_factor = tl.cast(row_group, tl.int64) * width
        first = row_group * rows_per_group + share * rows_per_share
        last = tl.minimum(first + rows_per_share, (row_group + 1) * rows_per_group)
        for row in range(first, last):
            from_row = tl.cast(row, tl.int64) * width
            s = load_scores(score, factor, from_row, from_factor, channel, is_member)
            g = tl.load(grad + from_row + channel, mask=is_member, other=0.0)
            g = g.to(tl.float32)
            ranks = ranks_of(s, member)
            best_dropped = tl.sum(tl.where(ranks == N, s, 0.0), axis=1)
            loser = tl.sum(tl.where(ranks == N, g, 0.0), axis=1)
            worst_kept = tl.sum(tl.where(ranks == N - 1, s, 0.0), axis=1)
            other = tl.sum(tl.where(ranks == N - 1, g, 0.0), axis=1)
            kept = ranks < N
            runner_up = tl.where(kept, best_dropped[:, None], worst_kept[:, None])
            of_runner_up = tl.where(kept, loser[:, None], other[:, None])
            lead = tl.log(tl.maximum(s, tiny)) - tl.log(tl.maximum(runner_up, tiny))
            chance = 1.0 / (1.0 + tl.exp(-lead / softness))
            total += (g - of_runner_up) * chance * (1.0 - chance) / softness
        to = (row_group * shares + share).to(tl.int64) * width
        tl.store(out + to + channel, total, mask=is_member)


@triton.jit
def move_costs_kernel(
    score,  # float32 [rows, width]
    grad,  # [rows, width]
    start,  # int64 [width], the channels block by block
    perm,  # int64 [width], the channels group by group
    places,  # int64 [width], group by group: where the channel stands in the blocks
    moves,  # float32 [parts, width, groups of a block]
    own,  # float32 [parts, width], block by block
    width,
    size,
    groups,
    rows,  # of the sample
    rows_per_part,
    offset,  # of the sample's first row
    stride,
    density,
    N: tl.constexpr,
    M: tl.constexpr,
    SIZE: tl.constexpr,  # the next powers of two
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """
    The costs of all moves in one block, and of staying, summed over the rows of a part.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    inside, group = tl.arange(0, SIZE), tl.arange(0, GROUPS)
    member = tl.arange(0, MEMBERS)
    is_channel, is_group = inside < size, group < groups
    is_member = is_group[:, None] & (member < M)[None, :]
    at = block * size + group[:, None] * M + member[None, :]
    channel_of = tl.load(perm + at, mask=is_member, other=0)
    place_of = tl.load(places + at, mask=is_member, other=0)
    place = block * size + inside
    channel = tl.load(start + place, mask=is_channel, other=0)
    of_moves = tl.zeros((SIZE, GROUPS), dtype=tl.float32)
    of_own = tl.zeros((GROUPS, MEMBERS), dtype=tl.float32)
    first = part * rows_per_part
    for index in range(first, tl.minimum(first + rows_per_part, rows)):
        from_row = (offset + index * stride).to(tl.int64) * width
        s = tl.load(score + from_row + channel_of, mask=is_member, other=-1.0)
        g = tl.load(grad + from_row + channel_of, mask=is_member, other=0.0)
        s, g = s.to(tl.float32), g.to(tl.float32)
        ranks = ranks_of(s, member)
        best_dropped = tl.sum(tl.where(ranks == N, s, 0.0), axis=1)
        loser = tl.sum(tl.where(ranks == N, g, 0.0), axis=1)
        worst_kept = tl.sum(tl.where(ranks == N - 1, s, 0.0), axis=1)
        other = tl.sum(tl.where(ranks == N - 1, g, 0.0), axis=1)
        of_own += tl.where(s > best_dropped[:, None], g - loser[:, None], 0.0)
        c = tl.load(score + from_row + channel, mask=is_channel, other=0.0)[:, None]
        d = tl.load(grad + from_row + channel, mask=is_channel, other=0.0)
        d = d.to(tl.float32)[:, None]
        of_moves += density * tl.where(
            c > best_dropped[None, :], d - loser[None, :], 0.0
        )
        of_moves += (1.0 - density) * tl.where(
            c > worst_kept[None, :], d - other[None, :], 0.0
        )
    from_part = part.to(tl.int64) * width
    to = (from_part + place)[:, None] * groups + group[None, :]
    tl.store(moves + to, of_moves, mask=is_channel[:, None] & is_group[None, :])
    tl.store(own + from_part + place_of, of_own, mask=is_member)


def mask_in_triton(
    score: Float[Tensor, "rows channels"],
    factor: Float[Tensor, "row_groups channels"],
    perm: Permutation,
    pattern: NMPattern,
) -> Bool[Tensor, "rows channels"]:
    """
    The N:M mask of scores times factors, channels in their places.

    :param factor: of the scores of equally many rows each
    :param perm: the channels group by group
    """
    rows, width = score.shape
    pairs = rows * (width // pattern.m)
    out = torch.empty(rows, width, dtype=torch.uint8, device=score.device)
    with torch.cuda.device_of(score):
        masks_kernel[(triton.cdiv(pairs, PAIRS),)](
            score,
            factor,
            perm,
            out,
            pairs,
            width // pattern.m,
            width,
            rows // len(factor),
            N=pattern.n,
            M=pattern.m,
            MEMBERS=triton.next_power_of_2(pattern.m),
            PAIRS=PAIRS,
        )
    return out.view(torch.bool)


def score_gradient_in_triton(
    score: Float[Tensor, "rows channels"],
    factor: Float[Tensor, "row_groups channels"],
    grad: Float[Tensor, "rows channels"],
    perm: Permutation,
    pattern: NMPattern,
) -> Float[Tensor, "row_groups channels"]:
    """
    ``score_gradient`` of scores times factors, summed over the rows of each row group.

    :param factor: as for ``mask_in_triton``
    :param grad: of the loss with respect to the mask
    :param perm: the channels group by group
    """
    rows, width = score.shape
    groups, row_groups = width // pattern.m, len(factor)
    tiles = triton.cdiv(groups, TILE_GROUPS)
    most = max(1, PROGRAMS // tiles)  # parts of a tile
    rows_per_group = rows // row_groups
    groups_per_part = triton.cdiv(row_groups, most)
    shares = max(1, min(rows_per_group // FEWEST_ROWS, most // row_groups))
    out = score.new_empty(row_groups * shares, width)
    with torch.cuda.device_of(score):
        score_gradient_kernel[
            (tiles, triton.cdiv(row_groups, groups_per_part) * shares)
        ](
            score,
            factor,
            grad.contiguous(),
            perm,
            out,
            groups,
            width,
            row_groups,
            groups_per_part,
            shares,
            triton.cdiv(rows_per_group, shares),
            rows_per_group,
            SOFTNESS,
            torch.finfo(torch.float32).tiny,
            N=pattern.n,
            M=pattern.m,
            GROUPS=TILE_GROUPS,
            MEMBERS=triton.next_power_of_2(pattern.m),
        )
    return out.view(row_groups, shares, width).sum(1)


def move_costs_in_triton(
    score: Float[Tensor, "rows channels"],
    grad: Float[Tensor, "rows channels"],
    start: Permutation,
    places: Permutation,
    group_of: Int[Tensor, "blocks size"],
    pattern: NMPattern,
    sample: slice,
) -> Float[Tensor, "blocks size groups"]:
    """
    ``move_costs`` over a sample of the rows.

    :param grad: of the loss with respect to the mask
    :param start: the channels block by block
    :param places: where the channels stand in the blocks, group by group
    :param group_of: the group of each channel in its block
    :param sample: the rows that count
    """
    rows, width = score.shape
    offset, _, stride = sample.indices(rows)
    rows = len(range(rows)[sample])
    blocks, size = group_of.shape
    groups = size // pattern.m
    tile = triton.next_power_of_2(size), triton.next_power_of_2(groups)
    parts = max(1, min(rows // FEWEST_ROWS, PROGRAMS // blocks))
    moves = score.new_empty(parts, width, groups)
    own = score.new_empty(parts, width)
    with torch.cuda.device_of(score):
        move_costs_kernel[(blocks, parts)](
            score,
            grad.contiguous(),
            start,
            start[places],
            places,
            moves,
            own,
            width,
            size,
            groups,
            rows,
            triton.cdiv(rows, parts),
            offset,
            stride,
            pattern.density,
            N=pattern.n,
            M=pattern.m,
            SIZE=tile[0],
            GROUPS=tile[1],
            MEMBERS=triton.next_power_of_2(pattern.m),
            num_warps=min(16, max(4, tile[0] * tile[1] // SUMS_OF_A_WARP)),
        )
    costs = moves.sum(0).view(blocks, size, groups)
    return costs.scatter_(-1, group_of[..., None], own.sum(0).view(blocks, size, 1))
