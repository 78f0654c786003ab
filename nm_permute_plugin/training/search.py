# SPDX-License-Identifier: Apache-2.0
"""A good order without gradients: channel allocation, then exact assignment."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from nm_permute_plugin.maths.assignment import assign
from nm_permute_plugin.maths.masks import at_rank, group_ranks, retained_score
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, from_blocks
from nm_permute_plugin.training.stacking import StackedScore

Score = Float[Tensor, "rows channels"]
Orders = dict[str, Permutation]
"""One order a space, by the space's name."""

ROUNDS_A_LOOK = 2
"""Retained score is a poor judge, so the text judges this often."""


@dataclass
class Searched:
    """
    What a search leaves.

    :param perms: by space, the orders that the judge likes best
    :param history: one entry a look: round, held-back loss
    """

    perms: Orders
    history: list[dict[str, int | float]] = field(default_factory=list)


def search_orders(
    stacks: Mapping[str, StackedScore],
    pattern: NMPattern,
    rounds: int,
    seed: int,
    judge: Callable[[Orders], float],
) -> Searched:
    """
    ``search_order`` of every space, several at a time, with looks at the whole.

    Every round retains more score, and the pruned model may still be worse for it: the
    orders that the judge likes best are kept, those as they are included. The exact
    assignments run on the CPU and leave Python's lock free: threads pay.

    :param rounds: of assignment; an even number is looked at to the end
    :param judge: the loss of the model under the orders, smaller is better
    """
    steps = {
        name: search_steps(stack.score, pattern, stack.space.wall, seed)
        for name, stack in stacks.items()
    }
    perms = {
        name: torch.arange(stack.space.size, device=stack.score.device)
        for name, stack in stacks.items()
    }
    best = judge(perms)
    searched = Searched(perms, [{"round": 0, "held_back": best}])
    advance = partial(_advance, count=1 + ROUNDS_A_LOOK)  # the start comes first
    looks = range(ROUNDS_A_LOOK, rounds + ROUNDS_A_LOOK, ROUNDS_A_LOOK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for look in tqdm(looks, "Searching the order"):
            perms = dict(zip(steps, pool.map(advance, steps.values()), strict=True))
            advance = partial(_advance, count=ROUNDS_A_LOOK)
            loss = judge(perms)
            searched.history.append({"round": look, "held_back": loss})
            if loss < best:
                best, searched.perms = loss, perms
    return searched


def search_order(
    score: Score,
    pattern: NMPattern,
    wall: int | None = None,
    rounds: int = 12,
    seed: int = 0,
) -> Permutation:
    """
    An order of the channels whose N:M mask retains more score than the order as it is.

    Channel allocation and assignment after RIA (Zhang et al., ICLR 2024, section 4), for
    all readers of a space at once: their score matrices stand one below the other. Each
    round takes one channel out of every group and puts all of them back by the best
    assignment, so the retained score never falls; groups are never worse than the better
    of the two starts, dealt and as they are.

    :param score: of every weight that reads the space, one column a channel
    :param wall: channels stay inside their run of so many; all may mix by default
    :param rounds: assignments
    :param seed: of the choice which channels leave their groups
    :raises ValueError: if M does not divide the wall
    """
    return _advance(search_steps(score, pattern, wall, seed), rounds + 1)


def search_steps(
    score: Score, pattern: NMPattern, wall: int | None = None, seed: int = 0
) -> Iterator[Permutation]:
    """
    The start of ``search_order``, then its order after every round, without end.

    :raises ValueError: at the start, if M does not divide the wall
    """
    wall = wall or score.shape[1]
    if wall % pattern.m:
        raise ValueError(f"M={pattern.m} does not divide the {wall} channels of a run")
    runs = rearrange(score, "rows (wall size) -> wall rows size", size=wall)
    blocks = [
        _block_steps(block, pattern, torch.Generator().manual_seed(seed + index))
        for index, block in enumerate(runs)
    ]
    while True:
        yield from_blocks(torch.stack([next(block) for block in blocks]))


def insertion_gain(
    inserted: Float[Tensor, "some rows"], threshold: Float[Tensor, "groups rows"]
) -> Float[Tensor, "some groups"]:
    """
    The score gained by each channel in each group, summed over the rows.

    A channel that joins M-1 others adds ``relu(s - t)``, t the N-th largest of those
    others, and ``relu(s - t) = (|s - t| + s - t) / 2``: an L1 distance matrix does it.

    >>> insertion_gain(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]]))
    tensor([[2.]])
    """
    distance = torch.cdist(inserted, threshold, p=1.0)
    return (distance + inserted.sum(1)[:, None] - threshold.sum(1)) / 2


def deal(score: Score, m: int) -> Int[Tensor, " channels"]:
    """
    RIA's channel allocation: channels sorted by their sum, dealt to the groups in turn.

    Every second deal runs backwards, so that strong channels do not meet.

    >>> deal(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), m=2)
    tensor([0, 3, 1, 2])
    """
    ranked = torch.argsort(score.sum(0), descending=True, stable=True)
    dealt = rearrange(ranked, "(m group) -> m group", m=m).clone()
    dealt[1::2] = dealt[1::2].flip(-1)
    return rearrange(dealt, "m group -> (group m)")


def _advance(steps: Iterator[Permutation], count: int) -> Permutation:
    """The last of the next so many orders."""
    return list(islice(steps, count))[-1]


def _block_steps(
    score: Score, pattern: NMPattern, generator: torch.Generator
) -> Iterator[Int[Tensor, " channels"]]:
    """Search over the channels of one wall, an order a round."""
    as_they_are = torch.arange(score.shape[1], device=score.device)
    starts = [as_they_are, deal(score, pattern.m)]
    order = max(starts, key=lambda start: retained_score(score[:, start], pattern))
    groups = rearrange(order, "(group m) -> group m", m=pattern.m)
    table = score.T.contiguous()
    while True:
        yield rearrange(groups.sort(dim=-1).values, "group m -> (group m)")
        shuffled = _shuffle_inside(groups, generator)
        leaving, staying = shuffled[:, 0], shuffled[:, 1:]
        companions = rearrange(table[staying], "group other rows -> group rows other")
        threshold = at_rank(companions, group_ranks(companions), pattern.n - 1)
        target = assign(insertion_gain(table[leaving], threshold)[None])[0]
        groups = torch.cat([leaving[torch.argsort(target)][:, None], staying], dim=1)


def _shuffle_inside(
    groups: Int[Tensor, "group m"], generator: torch.Generator
) -> Int[Tensor, "group m"]:
    keys = torch.rand(groups.shape, generator=generator).to(groups.device)
    return groups.gather(1, keys.argsort(dim=1))
