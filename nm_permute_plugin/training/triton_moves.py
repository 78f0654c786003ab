# SPDX-License-Identifier: Apache-2.0
"""``relaxation.sum_moves`` in Triton: one pass over the scores; import it with Triton."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

PROGRAMS = 4096
"""Enough to fill a GPU; each sums a share of the rows of one block."""


@triton.jit
def moves_kernel(
    score,  # float32 [rows, blocks, size], as the gradient
    grad,
    threshold,  # float32 [rows, blocks, groups], as the losers' gradient
    loser,
    out,  # float32 [parts, blocks, size, groups]
    rows,
    score_stride,  # elements from a row to the next
    grad_stride,
    group_stride,
    rows_a_part,
    size,
    groups,
    SIZE: tl.constexpr,  # the next powers of two
    GROUPS: tl.constexpr,
):
    """The sum over the rows of one part, for one block."""
    block, part = tl.program_id(0), tl.program_id(1)
    channel, group = tl.arange(0, SIZE), tl.arange(0, GROUPS)
    is_channel, is_group = channel < size, group < groups
    total = tl.zeros((SIZE, GROUPS), dtype=tl.float32)
    first = part.to(tl.int64) * rows_a_part
    for row in range(first, tl.minimum(first + rows_a_part, rows)):
        at, to = block * size + channel, block * groups + group
        s = tl.load(score + row * score_stride + at, mask=is_channel, other=0.0)
        g = tl.load(grad + row * grad_stride + at, mask=is_channel, other=0.0)
        t = tl.load(threshold + row * group_stride + to, mask=is_group, other=0.0)
        o = tl.load(loser + row * group_stride + to, mask=is_group, other=0.0)
        total += tl.where(s[:, None] > t[None, :], g[:, None] - o[None, :], 0.0)
    at = (part * tl.num_programs(0) + block).to(tl.int64) * size + channel
    mask = is_channel[:, None] & is_group[None, :]
    tl.store(out + at[:, None] * groups + group[None, :], total, mask=mask)


def sum_moves_in_triton(
    score: Float[Tensor, "rows blocks size"],
    grad: Float[Tensor, "rows blocks size"],
    threshold: Float[Tensor, "rows blocks groups"],
    loser: Float[Tensor, "rows blocks groups"],
) -> Float[Tensor, "blocks size groups"]:
    """``sum_r [s_rc > t_rg] (G_rc - L_rg)`` of every channel c and group g."""
    rows, blocks, size = score.shape
    groups = threshold.shape[2]
    parts = max(1, min(rows, PROGRAMS // blocks))
    out = score.new_empty(parts, blocks, size, groups, dtype=torch.float32)
    score, grad = _rows_of_runs(score), _rows_of_runs(grad)
    moves_kernel[(blocks, parts)](
        score,
        grad,
        threshold.contiguous(),
        loser.contiguous(),
        out,
        rows,
        score.stride(0),
        grad.stride(0),
        blocks * groups,
        triton.cdiv(rows, parts),
        size,
        groups,
        SIZE=triton.next_power_of_2(size),
        GROUPS=triton.next_power_of_2(groups),
    )
    return out.sum(0)


def _rows_of_runs(matrix: Tensor) -> Tensor:
    """The tensor itself where only its rows are apart, else a contiguous copy."""
    _, blocks, size = matrix.shape
    inner = matrix.stride()[1:]
    return matrix if inner == (size, 1) else matrix.contiguous()
