# SPDX-License-Identifier: Apache-2.0
"""``InsertionMask`` in Triton: one pass over the scores; import it with Triton."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from nm_permute_plugin.maths.mask_gradients import SOFTNESS, RowSample
from nm_permute_plugin.pruning.learn.grouping import Grouping

PROGRAMS = 4096
"""Enough to fill a GPU; each sums a share of the rows of one block."""

FEWEST_ROWS = 8
"""Of a share: the sums of each are written out, so short ones do not pay."""

SUMS_OF_A_WARP = 512
"""Of a tile, channels times groups: more would not stay in registers."""

PAIRS = 128
"""Of a row and a group; so many a program that makes masks."""


@triton.jit
def load_groups(matrix, factor, row, channel, place, is_member):
    """The scores of the members of groups, times their factors; -1 beside a group."""
    score = tl.load(matrix + row + channel, mask=is_member, other=-1.0).to(tl.float32)
    scale = tl.load(factor + place, mask=is_member, other=1.0)
    return score * scale


@triton.jit
def ranks_of(score, member):
    """The place of each score in its group, 0 for the largest; of equals the first."""
    others, own = score[:, :, None], score[:, None, :]
    earlier = member[:, None] < member[None, :]
    leads = (others > own) | ((others == own) & earlier[None, :, :])
    return tl.sum(leads.to(tl.int32), axis=1)


@triton.jit
def masks_kernel(
    score,  # float32 [rows, width]
    factor,  # float32 [sections, width], in the order of the blocks
    channels,  # int64 [width], by group
    places,  # int64 [width], by group: where the channel stands in the blocks
    out,  # uint8 [rows, width]
    pairs,  # rows times groups
    groups,
    width,
    rows_a_section,
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
    at = (group * M)[:, None] + member[None, :]
    channel = tl.load(channels + at, mask=is_member, other=0)
    place = tl.load(places + at, mask=is_member, other=0)
    place += (row // rows_a_section * width)[:, None]
    scores = load_groups(
        score, factor, (row * width)[:, None], channel, place, is_member
    )
    kept = ranks_of(scores, member) < N
    target = out + (row * width)[:, None] + channel
    tl.store(target, kept.to(tl.uint8), mask=is_member)


@triton.jit
def moves_kernel(
    score,  # float32 [rows, width]
    factor,  # float32 [sections, width], in the order of the blocks
    grad,  # [rows, width]
    start,  # int64 [width], the channels in the order of the blocks
    channels,  # int64 [width], by group
    places,  # int64 [width], by group: where the channel stands in the blocks
    moves,  # float32 [parts, width, groups of a block]
    own,  # float32 [parts, width], in the order of the blocks
    rival,  # float32 [runs times parts_a_run, width], the same
    width,
    size,
    groups,
    runs,
    runs_a_part,
    parts_a_run,  # above 1 only where runs_a_part is 1
    rows_a_part,  # of one run
    rows_a_run,
    rows_a_section,
    offset,
    stride,
    density,
    softness,
    tiny,
    N: tl.constexpr,
    M: tl.constexpr,
    MOVES: tl.constexpr,
    RIVALS: tl.constexpr,
    SIZE: tl.constexpr,  # the next powers of two
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """The sums over the rows of one part, for one block; rivals by run."""
    block, part = tl.program_id(0), tl.program_id(1)
    inside, group = tl.arange(0, SIZE), tl.arange(0, GROUPS)
    member = tl.arange(0, MEMBERS)
    is_channel, is_group = inside < size, group < groups
    is_member = is_group[:, None] & (member < M)[None, :]
    at = block * size + group[:, None] * M + member[None, :]
    channel_of = tl.load(channels + at, mask=is_member, other=0)
    place_of = tl.load(places + at, mask=is_member, other=0)
    place = block * size + inside
    channel = tl.load(start + place, mask=is_channel, other=0)
    of_moves = tl.zeros((SIZE, GROUPS), dtype=tl.float32)
    of_own = tl.zeros((GROUPS, MEMBERS), dtype=tl.float32)
    share = part % parts_a_run
    first_run = part // parts_a_run * runs_a_part
    for run in range(first_run, tl.minimum(first_run + runs_a_part, runs)):
        of_rival = tl.zeros((GROUPS, MEMBERS), dtype=tl.float32)
        first = run * rows_a_run + share * rows_a_part
        last = tl.minimum(first + rows_a_part, (run + 1) * rows_a_run)
        for index in range(first, last):
            row = (offset + index * stride).to(tl.int64)
            section = row // rows_a_section * width
            from_row = row * width
            s = load_groups(
                score, factor, from_row, channel_of, section + place_of, is_member
            )
            g = tl.load(grad + from_row + channel_of, mask=is_member, other=0.0)
            g = g.to(tl.float32)
            ranks = ranks_of(s, member)
            best_out = tl.sum(tl.where(ranks == N, s, 0.0), axis=1)
            loser = tl.sum(tl.where(ranks == N, g, 0.0), axis=1)
            worst_kept = tl.sum(tl.where(ranks == N - 1, s, 0.0), axis=1)
            other = tl.sum(tl.where(ranks == N - 1, g, 0.0), axis=1)
            if MOVES:
                of_own += tl.where(s > best_out[:, None], g - loser[:, None], 0.0)
                c = tl.load(score + from_row + channel, mask=is_channel, other=0.0)
                c *= tl.load(factor + section + place, mask=is_channel, other=1.0)
                d = tl.load(grad + from_row + channel, mask=is_channel, other=0.0)
                d = d.to(tl.float32)[:, None]
                c = c[:, None]
                of_moves += density * tl.where(
                    c > best_out[None, :], d - loser[None, :], 0.0
                )
                of_moves += (1.0 - density) * tl.where(
                    c > worst_kept[None, :], d - other[None, :], 0.0
                )
            if RIVALS:
                kept = ranks < N
                rival_score = tl.where(kept, best_out[:, None], worst_kept[:, None])
                rival_grad = tl.where(kept, loser[:, None], other[:, None])
                lead = tl.log(tl.maximum(s, tiny)) - tl.log(
                    tl.maximum(rival_score, tiny)
                )
                chance = 1.0 / (1.0 + tl.exp(-lead / softness))
                of_rival += (g - rival_grad) * chance * (1.0 - chance) / softness
        if RIVALS:
            of_share = (run * parts_a_run + share).to(tl.int64) * width
            tl.store(rival + of_share + place_of, of_rival, mask=is_member)
    from_part = part.to(tl.int64) * width
    if MOVES:
        to = (from_part + place)[:, None] * groups + group[None, :]
        tl.store(moves + to, of_moves, mask=is_channel[:, None] & is_group[None, :])
        tl.store(own + from_part + place_of, of_own, mask=is_member)


def kept_in_triton(
    score: Float[Tensor, "rows channels"],
    factor: Float[Tensor, "sections channels"],
    grouping: Grouping,
) -> Bool[Tensor, "rows channels"]:
    """
    The N:M mask of scores whose channels are grouped.

    :param factor: of the scores of the rows of each section, in the order of the blocks
    """
    rows, width = score.shape
    pattern = grouping.pattern
    pairs = rows * (width // pattern.m)
    out = torch.empty(rows, width, dtype=torch.uint8, device=score.device)
    with torch.cuda.device_of(score):
        masks_kernel[(triton.cdiv(pairs, PAIRS),)](
            score,
            factor,
            grouping.channels,
            grouping.places,
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


def moves_in_triton(
    score: Float[Tensor, "rows channels"],
    factor: Float[Tensor, "sections channels"],
    grad: Float[Tensor, "rows channels"],
    grouping: Grouping,
    sample: RowSample,
    choice: bool,
    multipliers: bool,
) -> tuple[
    Float[Tensor, "blocks size groups"] | None,
    Float[Tensor, "sections blocks size"] | None,
]:
    """
    ``insertion_costs`` over the sample of rows; ``rivalry``, summed over each section.

    :param factor: as for ``kept_in_triton``
    :param grad: of the loss with respect to the mask
    :param choice: False leaves the first out
    :param multipliers: False leaves the second out
    """
    blocks, size = grouping.column.shape
    sections = len(factor)
    sums = _Sums(score, factor, grad.contiguous(), grouping)
    costs = of_multiplier = None
    if choice and multipliers and sample.stride == 1:
        of_moves, own, rival = sums.over(RowSample(), sections, moves=True, rivals=True)
    else:
        if choice:
            of_moves, own, _ = sums.over(sample, 1, moves=True, rivals=False)
        if multipliers:
            _, _, rival = sums.over(RowSample(), sections, moves=False, rivals=True)
    if choice:
        costs = of_moves.sum(0).view(blocks, size, -1)
        own = own.sum(0).view(blocks, size, 1)
        costs.scatter_(-1, grouping.column[..., None], own)
    if multipliers:
        of_multiplier = rival.view(sections, -1, blocks, size).sum(1)
    return costs, of_multiplier


@dataclass(frozen=True)
class _Sums:
    """Sums over rows, as many parts of them at once as fill a GPU."""

    score: Tensor
    factor: Tensor
    grad: Tensor
    grouping: Grouping

    def over(
        self, sample: RowSample, runs: int, moves: bool, rivals: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        One sum a part: what moves change, and channels in their own groups; one of rivals
        a run, or several.

        :param runs: of the sample's rows, equally long
        """
        rows, width = self.score.shape
        grouping, pattern = self.grouping, self.grouping.pattern
        blocks, size = grouping.column.shape
        groups = size // pattern.m
        tile = triton.next_power_of_2(size), triton.next_power_of_2(groups)
        in_run = len(range(rows)[sample.offset :: sample.stride]) // runs
        most = max(1, PROGRAMS // blocks)  # parts of a block
        runs_a_part = triton.cdiv(runs, most)
        shares = max(1, min(in_run // FEWEST_ROWS, most // runs))
        parts = triton.cdiv(runs, runs_a_part) * shares

        def empty(wanted: bool, *shape: int) -> Tensor:
            return self.score.new_empty(shape if wanted else (1,))

        of_moves = empty(moves, parts, width, groups)
        own = empty(moves, parts, width)
        rival = empty(rivals, runs * shares, width)
        with torch.cuda.device_of(self.score):
            moves_kernel[(blocks, parts)](
                self.score,
                self.factor,
                self.grad,
                grouping.start,
                grouping.channels,
                grouping.places,
                of_moves,
                own,
                rival,
                width,
                size,
                groups,
                runs,
                runs_a_part,
                shares,
                triton.cdiv(in_run, shares),
                in_run,
                rows // len(self.factor),
                sample.offset,
                sample.stride,
                pattern.density,
                SOFTNESS,
                torch.finfo(torch.float32).tiny,
                N=pattern.n,
                M=pattern.m,
                MOVES=moves,
                RIVALS=rivals,
                SIZE=tile[0],
                GROUPS=tile[1],
                MEMBERS=triton.next_power_of_2(pattern.m),
                num_warps=min(16, max(4, tile[0] * tile[1] // SUMS_OF_A_WARP)),
            )
        return of_moves, own, rival
