# SPDX-License-Identifier: Apache-2.0
"""
Swaps of two channels, by the cost of moving each of them to the other's group.

With ``G`` as in ``maths.mask_gradients``: where a channel c would be kept in group g, it
enters the mask and the loser leaves it, ``sum_r [s_rc > t_rg] (G_rc - G_r,loser(g))``.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nm_permute_plugin.maths.assignment import order_by
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.ranks import at_rank, group_ranks


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


def swap_gains(
    costs: Float[Tensor, "blocks size groups"], group_of: Int[Tensor, "blocks size"]
) -> Float[Tensor, "blocks size size"]:
    """
    How much the loss should fall, to first order, when two channels change places.

    :param costs: the change of the loss when a channel joins a group, relative to its
        being in none (``move_costs``)
    :param group_of: the group of each channel

    >>> from torch import tensor
    >>> swap_gains(tensor([[[2.0, 1.0], [0.0, 3.0]]]), tensor([[0, 1]]))
    tensor([[[0., 4.],
             [4., 0.]]])
    """
    blocks, size, _ = costs.shape
    joined = costs.gather(2, group_of[:, None, :].expand(blocks, size, size))
    own = joined.diagonal(dim1=1, dim2=2)
    gains = own[:, :, None] + own[:, None, :] - joined - joined.transpose(1, 2)
    return gains.masked_fill(group_of[:, :, None] == group_of[:, None, :], 0)


def swap(
    costs: Float[Tensor, "blocks size groups"],
    group_of: Int[Tensor, "blocks size"],
    most: int,
) -> None:
    """
    Swap two channels of a block, in place, in the blocks where the loss should fall most.

    One swap a block is made: a second would rest on costs that the first has changed. The
    costs of channels that were swapped are zeroed.

    :param most: swaps at most; one is always tried
    """
    size = group_of.shape[1]
    best, pair = swap_gains(costs, group_of).flatten(1).max(1)
    top = best.topk(min(max(1, most), len(best)))
    blocks = top.indices[top.values > 0]
    first, second = pair[blocks] // size, pair[blocks] % size
    of_first, of_second = group_of[blocks, first], group_of[blocks, second]
    group_of[blocks, first], group_of[blocks, second] = of_second, of_first
    costs[blocks, first] = 0
    costs[blocks, second] = 0
