# SPDX-License-Identifier: Apache-2.0
"""N:M masks that depend differentiably on an assignment of channels."""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nm_permute_plugin.maths.assignment import order_by
from nm_permute_plugin.maths.masks import at_rank, group_ranks
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, invert

Assignment = Float[Tensor, "blocks size columns"]
"""Share of each channel in each column: a place (``columns == size``) or a group."""


SOFTNESS = 0.3
"""How far ahead a rival still counts, in units of the log-score."""


def permuted_mask(
    score: Float[Tensor, "rows blocks size"], places: Assignment, pattern: NMPattern
) -> Float[Tensor, "rows blocks size"]:
    """
    The N:M mask of permuted scores, brought back to the channels as they stand.

    ``mask = top_N(S P) P^T``; the top-N is exact forward, and has the gradient of
    N times the softmax inside each group backward (PermLLM,
    https://arxiv.org/abs/2510.10136, eq. 8). Scores are taken relative to their group.

    :param places: soft, or hard with a straight-through gradient; square blocks
    """
    permuted = torch.einsum("rbi,bij->rbj", score, places)
    groups = rearrange(permuted, "r b (g m) -> r b g m", m=pattern.m)
    scale = groups.detach().mean(-1, keepdim=True).clamp_min(1e-12)
    soft = pattern.n * torch.softmax(groups / scale, dim=-1)
    hard = (group_ranks(groups.detach()) < pattern.n).to(soft.dtype)
    mask = rearrange(hard + soft - soft.detach(), "r b g m -> r b (g m)")
    return torch.einsum("rbj,bij->rbi", mask, places)


@dataclass(frozen=True)
class RowSample:
    """
    Which rows weigh the moves of a step: ``offset``, ``offset + stride``, and so on.

    All rows make the mask. A space has far more rows than a step's gradient has signal.
    """

    offset: int = 0
    stride: int = 1

    @classmethod
    def of_step(cls, rows: int, limit: int | None, step: int) -> "RowSample":
        """
        At most ``limit`` rows, other ones each step.

        >>> RowSample.of_step(rows=100, limit=40, step=4)
        RowSample(offset=1, stride=3)
        """
        stride = 1 if limit is None else -(-rows // limit)
        return cls(step % stride, stride)

    def after(self, rows: int) -> "RowSample":
        """
        The same sample, where the first so many rows are left out.

        >>> RowSample(offset=1, stride=3).after(rows=2)
        RowSample(offset=2, stride=3)
        """
        return RowSample((self.offset - rows) % self.stride, self.stride)


def grouped_mask(
    score: Float[Tensor, "rows blocks size"],
    column: Int[Tensor, "blocks size"],
    pattern: NMPattern,
) -> Bool[Tensor, "rows blocks size"]:
    """The N:M mask of scores whose channels are grouped by ``column``."""
    order = order_by(column).expand_as(score)
    grouped = rearrange(score.gather(-1, order), "r b (g m) -> r b g m", m=pattern.m)
    kept = rearrange(group_ranks(grouped) < pattern.n, "r b g m -> r b (g m)")
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def multiplied(
    score: Float[Tensor, "rows blocks size"],
    log_multiplier: Float[Tensor, "sections blocks size"],
) -> Float[Tensor, "rows blocks size"]:
    """Scores times the multipliers of their section, a run of rows as long as others."""
    count = len(log_multiplier)
    sections = rearrange(score, "(section row) b s -> section row b s", section=count)
    scaled = sections * log_multiplier.exp()[:, None]
    return rearrange(scaled, "section row b s -> (section row) b s")


class Reorder(torch.autograd.Function):
    """``matrix[:, perm]``, whose gradient is a plain reordering too."""

    @staticmethod
    def forward(
        ctx: Any, matrix: Float[Tensor, "rows channels"], perm: Permutation
    ) -> Float[Tensor, "rows channels"]:
        ctx.save_for_backward(perm)
        return matrix[:, perm]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (perm,) = ctx.saved_tensors
        return grads[0][:, invert(perm)], None


def rivalry(
    score: Float[Tensor, "rows blocks size"],
    grad: Float[Tensor, "rows blocks size"],
    column: Int[Tensor, "blocks size"],
    pattern: NMPattern,
    softness: float = SOFTNESS,
) -> Float[Tensor, "rows blocks size"]:
    """
    The change of the loss when a log-score grows, were the choice a little soft.

    A kept weight's rival is the best that was dropped, a dropped weight's the worst that
    was kept. The weight is kept with probability ``sigmoid(lead / softness)``, lead the
    difference of the two log-scores; what is kept otherwise is the rival.

    :param grad: of the loss with respect to the mask
    :param softness: see ``SOFTNESS``
    """
    order = order_by(column).expand_as(score)

    def grouped(values: Tensor) -> Tensor:
        return rearrange(values.gather(-1, order), "r b (g m) -> r b g m", m=pattern.m)

    logs = grouped(score).clamp_min(torch.finfo(score.dtype).tiny).log()
    grads = grouped(grad).float()
    ranks = group_ranks(logs)
    kept = ranks < pattern.n

    def rival(values: Tensor) -> Tensor:
        best_out = at_rank(values, ranks, pattern.n)[..., None]
        worst_kept = at_rank(values, ranks, pattern.n - 1)[..., None]
        return torch.where(kept, best_out, worst_kept)

    chance = torch.sigmoid((logs - rival(logs)) / softness)
    change = (grads - rival(grads)) * chance * (1 - chance) / softness
    back = rearrange(change, "r b g m -> r b (g m)")
    return torch.zeros_like(back).scatter_(-1, order, back)


def insertion_costs(
    score: Float[Tensor, "rows blocks size"],
    grad: Float[Tensor, "rows blocks size"],
    column: Int[Tensor, "blocks size"],
    pattern: NMPattern,
) -> Float[Tensor, "blocks size groups"]:
    """
    The first-order change of the loss when channel ``c`` joins group ``g``.

    Relative to c being in no group: where c would be kept, its own mask gradient less
    that of the weight it pushes out, ``sum_r [s_rc > t_rg] (G_rc - G_r,out(g))``. ``t``
    is the N-th best score among the M-1 channels that would be c's companions: for c's
    own group those that are there; for another group any M-1 of its M with equal chance,
    which makes ``t`` the (N+1)-th best with chance N/M, else the N-th.

    :param grad: of the loss with respect to the mask
    :param column: the group of each channel
    """
    rows, blocks, size = score.shape
    count = size // pattern.m
    costs = torch.zeros(blocks, size, count, dtype=torch.float32, device=score.device)
    own = torch.zeros(blocks, size, dtype=torch.float32, device=score.device)
    order = order_by(column)
    # Small enough for a CPU's cache, large enough to fill a GPU.
    elements = 1 << (20 if score.device.type == "cpu" else 26)
    step = max(1, elements // (blocks * size * count))
    for start in range(0, rows, step):
        s, g = score[start : start + step], grad[start : start + step].float()
        index = order.expand_as(s)
        grouped = rearrange(s.gather(-1, index), "r b (g m) -> r b g m", m=pattern.m)
        grads = rearrange(g.gather(-1, index), "r b (g m) -> r b g m", m=pattern.m)
        ranks = group_ranks(grouped)
        best_out, loser = (at_rank(x, ranks, pattern.n) for x in (grouped, grads))
        worst_kept, other = (at_rank(x, ranks, pattern.n - 1) for x in (grouped, grads))
        costs += pattern.density * sum_moves(s, g, best_out, loser)
        costs += (1 - pattern.density) * sum_moves(s, g, worst_kept, other)
        group = column.expand_as(s)
        kept = s > best_out.gather(-1, group)
        own += ((g - loser.gather(-1, group)) * kept).sum(0)
    return costs.scatter_(-1, column[..., None], own[..., None])


def sum_moves(
    score: Float[Tensor, "rows blocks size"],
    grad: Float[Tensor, "rows blocks size"],
    threshold: Float[Tensor, "rows blocks groups"],
    loser: Float[Tensor, "rows blocks groups"],
) -> Float[Tensor, "blocks size groups"]:
    """``sum_r [s_rc > t_rg] (G_rc - L_rg)`` of every channel c and group g."""
    # Kept in floating point: several times faster on a CPU than a boolean.
    enters = torch.sub(score[..., None], threshold[:, :, None]).gt_(0)
    return torch.sub(grad[..., None], loser[:, :, None]).mul_(enters).sum(0)
