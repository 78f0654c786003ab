# SPDX-License-Identifier: Apache-2.0
"""N:M masks: which weights of every group of M input channels are kept."""

from itertools import combinations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from nm_permute_plugin.maths.pattern import NMPattern


def group_ranks(score: Float[Tensor, "*rows m"]) -> Int[Tensor, "*rows m"]:
    """
    The place of each score in its group, 0 for the largest; of equals the first leads.

    >>> group_ranks(torch.tensor([[4.0, 1.0, 4.0, 5.0]]))
    tensor([[1, 3, 2, 0]], dtype=torch.int16)
    """
    columns = by_place(score)
    last = len(columns) - 1
    ranks = [torch.full_like(c, last - place) for place, c in enumerate(columns)]
    for first, second in combinations(range(len(columns)), 2):
        # In place, a comparison gives numbers: a CPU makes them far faster than booleans.
        leads = columns[first].clone().ge_(columns[second])
        ranks[second] += leads
        ranks[first] -= leads
    return torch.stack(ranks).movedim(0, -1).to(torch.int16)


def at_rank(
    values: Float[Tensor, "*rows m"], ranks: Int[Tensor, "*rows m"], rank: int
) -> Float[Tensor, "*rows"]:
    """
    The value whose score has the given rank in its group.

    Faster than sorting, and than a choice by a condition, which a CPU makes one by one.

    >>> at_rank(torch.tensor([[4.0, 1.0, 5.0]]), torch.tensor([[1, 2, 0]]), 0)
    tensor([5.])
    """
    found = torch.zeros_like(values[..., 0])
    for value, place in zip(by_place(values), by_place(ranks), strict=True):
        found.addcmul_(value, place.to(values.dtype).eq_(rank))
    return found


def descending(score: Float[Tensor, "*rows m"]) -> list[Float[Tensor, "*rows"]]:
    """
    The scores of every group from the largest to the smallest, one tensor a place.

    >>> descending(torch.tensor([[4.0, 1.0, 5.0]]))
    [tensor([5.]), tensor([4.]), tensor([1.])]
    """
    columns = list(by_place(score))
    for end in range(len(columns) - 1, 0, -1):
        for place in range(end):
            pair = columns[place], columns[place + 1]
            columns[place], columns[place + 1] = (
                torch.maximum(*pair),
                torch.minimum(*pair),
            )
    return columns


def by_place(groups: Shaped[Tensor, "*rows m"]) -> tuple[Shaped[Tensor, "*rows"], ...]:
    """The first of every group, the second, and so on, each contiguous in memory."""
    return groups.movedim(-1, 0).contiguous().unbind()


def nm_mask(
    score: Float[Tensor, "out in"], pattern: NMPattern
) -> Bool[Tensor, "out in"]:
    """
    Keep the ``n`` best-scored weights of every ``m`` consecutive input channels.

    Ties keep the lower channel, on every device: scores of quantized weights tie often.

    :param score: importance of each weight, larger is kept; must be finite
    :param pattern: the N:M pattern; ``m`` must divide ``in``
    :return: True where the weight is kept
    :raises ValueError: if ``m`` does not divide ``in``, or a score is not finite

    >>> nm_mask(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), NMPattern(2, 4))
    tensor([[ True, False,  True, False]])
    """
    _check_width(score.shape[-1], pattern)
    if not bool(torch.isfinite(score).all()):
        row, channel = (~torch.isfinite(score)).nonzero()[0].tolist()
        raise ValueError(
            f"the score of row {row}, input channel {channel} is "
            f"{score[row, channel].item()}; scores must be finite. Look for NaN or "
            "infinity in the weights and in the calibration activations."
        )
    groups = rearrange(score, "out (group m) -> out group m", m=pattern.m)
    return rearrange(group_ranks(groups) < pattern.n, "out group m -> out (group m)")


def retained_score(score: Float[Tensor, "out in"], pattern: NMPattern) -> float:
    """
    The sum of the scores that the N:M mask keeps, accumulated in float64.

    >>> retained_score(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), NMPattern(2, 4))
    7.0
    """
    return float(score.masked_fill(~nm_mask(score, pattern), 0).double().sum())


def _check_width(width: int, pattern: NMPattern) -> None:
    if width % pattern.m:
        raise ValueError(
            f"M={pattern.m} of the pattern {pattern} does not divide the {width} input "
            "channels. Use another mask_structure, or put the layer under `ignore`."
        )
