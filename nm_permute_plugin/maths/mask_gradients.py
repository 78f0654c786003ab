# SPDX-License-Identifier: Apache-2.0
"""
What the gradient of an N:M mask says about scores, and about moving channels.

``G`` is the gradient of the loss with respect to a mask of zeros and ones. To first order a
weight that enters the mask changes the loss by its ``G``, and one that leaves it by ``-G``.
An N:M mask changes by pairs: whatever enters a group pushes the weight at the boundary out.
So both functions here are first-order changes of the loss:

- a score grows: the weight enters with the probability that a soft choice gives it, and its
  runner-up leaves, ``(G - G_runner_up) dp`` (``score_gradient``)
- channel c joins group g: in the rows where it would be kept, it enters and the loser
  leaves, ``sum_r [s_rc > t_rg] (G_rc - G_r,loser(g))`` (``move_costs``)
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nm_permute_plugin.maths.assignment import order_by
from nm_permute_plugin.maths.masks import at_rank, group_ranks
from nm_permute_plugin.maths.pattern import NMPattern

SOFTNESS = 0.3
"""Temperature of the soft choice in units of the log-score: how far ahead of its
runner-up a weight still has a gradient."""


def score_gradient(
    score: Float[Tensor, "rows groups m"],
    grad: Float[Tensor, "rows groups m"],
    pattern: NMPattern,
    softness: float = SOFTNESS,
) -> Float[Tensor, "rows groups m"]:
    """
    The change of the loss when a log-score grows, as if the hard choice were a little soft.

    The runner-up of a kept weight is the best that was dropped, that of a dropped
    weight the worst that was kept. The weight is kept with probability ``sigmoid(lead /
    softness)``, the lead being the difference of the two log-scores; otherwise its
    runner-up is kept.

    :param score: of the weights, group by group
    :param grad: of the loss with respect to the mask
    :param softness: see ``SOFTNESS``
    """
    logs = score.clamp_min(torch.finfo(score.dtype).tiny).log()
    grads = grad.float()
    ranks = group_ranks(logs)
    kept = ranks < pattern.n

    def runner_up(values: Tensor) -> Tensor:
        best_dropped = at_rank(values, ranks, pattern.n)[..., None]
        worst_kept = at_rank(values, ranks, pattern.n - 1)[..., None]
        return torch.where(kept, best_dropped, worst_kept)

    chance = torch.sigmoid((logs - runner_up(logs)) / softness)
    return (grads - runner_up(grads)) * chance * (1 - chance) / softness


def grouped_mask(
    score: Float[Tensor, "rows blocks size"],
    group_of: Int[Tensor, "blocks size"],
    pattern: NMPattern,
) -> Bool[Tensor, "rows blocks size"]:
    """
    The N:M mask of scores whose channels are in groups.

    :param group_of: the group of each channel in its block
    """
    order = order_by(group_of).expand_as(score)
    grouped = rearrange(score.gather(-1, order), "r b (g m) -> r b g m", m=pattern.m)
    kept = rearrange(group_ranks(grouped) < pattern.n, "r b g m -> r b (g m)")
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def move_costs(
    score: Float[Tensor, "rows blocks size"],
    grad: Float[Tensor, "rows blocks size"],
    group_of: Int[Tensor, "blocks size"],
    pattern: NMPattern,
) -> Float[Tensor, "blocks size groups"]:
    """
    The first-order change of the loss when channel ``c`` joins group ``g``.

    It is relative to c being in no group. The threshold ``t`` is the N-th best score
    among the M-1 channels that would be c's companions: for c's own group those that
    are there; for another group any M-1 of its M with equal chance, which makes ``t``
    the (N+1)-th best with chance N/M, else the N-th.

    :param grad: of the loss with respect to the mask
    :param group_of: the group of each channel in its block
    """
    rows, blocks, size = score.shape
    count = size // pattern.m
    costs = torch.zeros(blocks, size, count, dtype=torch.float32, device=score.device)
    own = torch.zeros(blocks, size, dtype=torch.float32, device=score.device)
    order = order_by(group_of)
    # Small enough for a CPU's cache, large enough to fill a GPU.
    elements = 1 << (20 if score.device.type == "cpu" else 26)
    step = max(1, elements // (blocks * size * count))
    for start in range(0, rows, step):
        s, g = score[start : start + step], grad[start : start + step].float()
        index = order.expand_as(s)
        grouped = rearrange(s.gather(-1, index), "r b (g m) -> r b g m", m=pattern.m)
        grads = rearrange(g.gather(-1, index), "r b (g m) -> r b g m", m=pattern.m)
        ranks = group_ranks(grouped)
        best_dropped, loser = (at_rank(x, ranks, pattern.n) for x in (grouped, grads))
        worst_kept, other = (at_rank(x, ranks, pattern.n - 1) for x in (grouped, grads))
        costs += pattern.density * _sum_moves(s, g, best_dropped, loser)
        costs += (1 - pattern.density) * _sum_moves(s, g, worst_kept, other)
        group = group_of.expand_as(s)
        kept = s > best_dropped.gather(-1, group)
        own += ((g - loser.gather(-1, group)) * kept).sum(0)
    return costs.scatter_(-1, group_of[..., None], own[..., None])


def _sum_moves(
    score: Float[Tensor, "rows blocks size"],
    grad: Float[Tensor, "rows blocks size"],
    threshold: Float[Tensor, "rows blocks groups"],
    loser: Float[Tensor, "rows blocks groups"],
) -> Float[Tensor, "blocks size groups"]:
    """``sum_r [s_rc > t_rg] (G_rc - L_rg)`` for every channel c and group g."""
    # Kept in floating point: several times faster on a CPU than a boolean.
    enters = torch.sub(score[..., None], threshold[:, :, None]).gt_(0)
    return torch.sub(grad[..., None], loser[:, :, None]).mul_(enters).sum(0)
