# SPDX-License-Identifier: Apache-2.0
"""
Rank the values of small groups: by whole tensors, one for every place of a group.

All is written without ``torch.where``, ``masked_fill`` and boolean results, which a CPU
computes one by one.
"""

from itertools import combinations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


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
