# SPDX-License-Identifier: Apache-2.0
"""
Put channels into groups of M: RIA's channel allocation, and the gain of every
assignment.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


def allocate(
    score: Float[Tensor, "*segments rows channels"], m: int
) -> Int[Tensor, "*segments channels"]:
    """
    RIA's channel allocation (Zhang et al., ICLR 2024, section 4): channels sorted by
    the sum of their scores are dealt to the groups in turn.

    Every second deal runs backwards, so that strong channels do not meet.

    :return: the channels, group by group

    >>> allocate(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), m=2)
    tensor([0, 3, 1, 2])
    """
    ranked = torch.argsort(score.sum(-2), dim=-1, descending=True, stable=True)
    dealt = rearrange(ranked, "... (m group) -> ... m group", m=m).clone()
    dealt[..., 1::2, :] = dealt[..., 1::2, :].flip(-1)
    return rearrange(dealt, "... m group -> ... (group m)")


def joining_gain(
    score: Float[Tensor, "*segments channels rows"],
    threshold: Float[Tensor, "*segments groups rows"],
) -> Float[Tensor, "*segments channels groups"]:
    """
    The score gained when each channel joins each group, summed over the rows.

    A channel that joins M-1 others adds ``relu(s - t)``, t the N-th largest of those
    others, and ``relu(s - t) = (|s - t| + s - t) / 2``: an L1 distance matrix does it.

    >>> joining_gain(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]]))
    tensor([[2.]])
    """
    distance = torch.cdist(score, threshold, p=1.0)
    own, least = score.sum(-1)[..., None], threshold.sum(-1)[..., None, :]
    return (distance + own - least) / 2
