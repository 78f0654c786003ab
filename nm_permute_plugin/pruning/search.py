# SPDX-License-Identifier: Apache-2.0
"""A good order without learning: channel allocation, then exact assignment."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from nm_permute_plugin.maths.assignment import assign
from nm_permute_plugin.maths.masks import at_rank, group_ranks, retained_score
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, from_blocks
from nm_permute_plugin.pruning.stacking import StackedScore

Score = Float[Tensor, "rows channels"]
Runs = Float[Tensor, "runs rows size"]
"""Scores cut at the segments of their spaces."""

Step = TypeVar("Step")
Orders = dict[str, Permutation]
"""One order a space, by the space's name."""

ROUNDS_A_LOOK = 3
"""Retained score is a poor judge, so the text judges this often."""

MOST_SCORES = 1 << 28
"""Searched at a time; more do not make a GPU any faster."""

MOST_SCORES_OF_A_SPACE = 1 << 28
"""Of a space with more, evenly spread rows are searched: they know what the others want."""


@dataclass
class Searched:
    """
    What a search leaves.

    :param perms: by space, the orders that the judge likes best
    :param history: one entry a look: round, least validation loss so far
    """

    perms: Orders
    history: list[dict[str, int | float]] = field(default_factory=list)


def search_orders(
    stacks: Mapping[str, StackedScore],
    pattern: NMPattern,
    rounds: int,
    seed: int,
    judge: Callable[[Orders], float],
    device: torch.device | None = None,
) -> Searched:
    """
    ``search_order`` of every space, with looks at the whole.

    Every round retains more score, and the pruned model may still be worse for it: the
    orders that the judge likes best are kept, those as they are included. At every look
    all orders may take the place of the best, or those of one family of spaces alone.

    :param rounds: of assignment, rounded up to the next look
    :param judge: the loss of the model under the orders, smaller is better
    :param device: where the orders are found, the scores of one round at a time; by
        default where the scores are
    """
    perms = {
        name: torch.arange(stack.space.size, device=device or stack.score.device)
        for name, stack in stacks.items()
    }
    best = judge(perms)
    searched = Searched(perms, [{"round": 0, "validation": best}])
    steps = _steps_of_all(stacks, pattern, seed, device)
    next(steps)  # the start: as they are or dealt, whichever retains more
    looks = range(ROUNDS_A_LOOK, rounds + ROUNDS_A_LOOK, ROUNDS_A_LOOK)
    for look in tqdm(looks, "Searching the order"):
        perms = _advance(steps, ROUNDS_A_LOOK)
        for names in (list(stacks), *_families(stacks)):
            tried = searched.perms | {name: perms[name] for name in names}
            loss = judge(tried)
            if loss < best:
                best, searched.perms = loss, tried
        searched.history.append({"round": look, "validation": best})
    return searched


def search_order(
    score: Score,
    pattern: NMPattern,
    segment: int | None = None,
    rounds: int = 12,
    seed: int = 0,
) -> Permutation:
    """
    An order of the channels whose N:M mask retains more score than the order as it is.

    Channel allocation and assignment after RIA (Zhang et al., ICLR 2024, section 4), for
    all consumers of a space at once: their score matrices stand one below the other. Each
    round takes one channel out of every group and puts all of them back by the best
    assignment, so the retained score never falls; groups are never worse than the better
    of the two starts, dealt and as they are.

    :param score: of every weight that reads the space, one column a channel
    :param segment: channels stay inside their run of so many; all may mix by default
    :param rounds: assignments
    :param seed: of the choice which channels leave their groups
    :raises ValueError: if M does not divide the segment
    """
    runs = _runs(score, pattern, segment or score.shape[1])
    return from_blocks(_advance(_steps(runs, pattern, _dice(runs, seed)), rounds + 1))


def insertion_gain(
    inserted: Float[Tensor, "*runs some rows"],
    threshold: Float[Tensor, "*runs groups rows"],
) -> Float[Tensor, "*runs some groups"]:
    """
    The score gained by each channel in each group, summed over the rows.

    A channel that joins M-1 others adds ``relu(s - t)``, t the N-th largest of those
    others, and ``relu(s - t) = (|s - t| + s - t) / 2``: an L1 distance matrix does it.

    >>> insertion_gain(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]]))
    tensor([[2.]])
    """
    distance = torch.cdist(inserted, threshold, p=1.0)
    own, least = inserted.sum(-1)[..., None], threshold.sum(-1)[..., None, :]
    return (distance + own - least) / 2


def deal(
    score: Float[Tensor, "*runs rows channels"], m: int
) -> Int[Tensor, "*runs channels"]:
    """
    RIA's channel allocation: channels sorted by their sum, dealt to the groups in turn.

    Every second deal runs backwards, so that strong channels do not meet.

    >>> deal(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), m=2)
    tensor([0, 3, 1, 2])
    """
    ranked = torch.argsort(score.sum(-2), dim=-1, descending=True, stable=True)
    dealt = rearrange(ranked, "... (m group) -> ... m group", m=m).clone()
    dealt[..., 1::2, :] = dealt[..., 1::2, :].flip(-1)
    return rearrange(dealt, "... m group -> ... (group m)")


def _families(stacks: Mapping[str, StackedScore]) -> list[list[str]]:
    """The spaces of each family, where there is more than one."""
    families: dict[str, list[str]] = defaultdict(list)
    for name, stack in stacks.items():
        families[stack.space.family].append(name)
    return list(families.values()) if len(families) > 1 else []


def _runs(score: Score, pattern: NMPattern, segment: int) -> Runs:
    """The score, cut at the segments."""
    if segment % pattern.m:
        raise ValueError(
            f"M={pattern.m} does not divide the {segment} channels of a run"
        )
    return rearrange(score, "rows (run size) -> run rows size", size=segment)


def _dice(runs: Runs, seed: int) -> list[torch.Generator]:
    """A generator a run, so that its order does not depend on its company."""
    return [torch.Generator().manual_seed(seed + run) for run in range(len(runs))]


def _advance(steps: Iterator[Step], count: int) -> Step:
    """The last of the next so many."""
    return list(islice(steps, count))[-1]


def _steps_of_all(
    stacks: Mapping[str, StackedScore],
    pattern: NMPattern,
    seed: int,
    device: torch.device | None,
) -> Iterator[Orders]:
    """The orders of all spaces, a step at a time; runs of one shape go together."""
    runs = {
        name: _runs(stack.score[:: _stride(stack)], pattern, stack.space.segment)
        for name, stack in stacks.items()
    }
    batches = []
    for names in _alike({name: of.shape[1:] for name, of in runs.items()}):
        dice = [die for name in names for die in _dice(runs[name], seed)]
        sizes = [len(runs[name]) for name in names]
        # Some at a time, and no name for them: copies would not fit beside a large model.
        together = _steps(
            torch.cat([_weighed(runs[name], stacks[name]) for name in names]),
            *(pattern, dice, device),
        )
        batches.append((names, sizes, together))
    del runs
    while True:
        found: Orders = {}
        for names, sizes, steps in batches:
            parts = next(steps).split(sizes)
            found |= dict(zip(names, map(from_blocks, parts), strict=True))
        yield {name: found[name] for name in stacks}


def _stride(stack: StackedScore) -> int:
    """1 takes all rows of a score; more, evenly spread ones of one that is very large."""
    return -(-stack.score.numel() // MOST_SCORES_OF_A_SPACE)


def _weighed(runs: Runs, stack: StackedScore) -> Runs:
    """The runs of a space, each row times what it counts."""
    if stack.weights is None:
        return runs
    return runs * stack.weights[:: _stride(stack), None].to(runs.device)


def _alike(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Names whose shapes are the same, as many at a time as fit."""
    by_shape: dict[torch.Size, list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        by_shape[shape].append(name)
    for shape, names in by_shape.items():
        most = max(1, MOST_SCORES // shape.numel())
        yield from (names[i : i + most] for i in range(0, len(names), most))


def _steps(
    runs: Runs,
    pattern: NMPattern,
    dice: Sequence[torch.Generator],
    device: torch.device | None = None,
) -> Iterator[Int[Tensor, "runs size"]]:
    """The start of the search in every run, then its order after each round, for ever."""
    device = device or runs.device
    groups = _start(runs.to(device), pattern)
    table = rearrange(runs, "run rows size -> run size rows").contiguous()
    del runs  # as large as the table
    while True:
        in_order = groups.sort(dim=-1).values
        yield rearrange(in_order, "run group m -> run (group m)")
        keys = torch.stack(
            [torch.rand(groups.shape[1:], generator=die) for die in dice]
        )
        shuffled = groups.gather(-1, keys.to(device).argsort(dim=-1))
        groups = _put_back(table.to(device), shuffled, pattern)


def _put_back(
    table: Float[Tensor, "runs size rows"],
    groups: Int[Tensor, "runs groups m"],
    pattern: NMPattern,
) -> Int[Tensor, "runs groups m"]:
    """The groups after the first channel of each has gone where all gain most."""
    run = torch.arange(len(table), device=table.device)[:, None, None]
    leaving, staying = groups[..., :1], groups[..., 1:]
    companions = rearrange(table[run, staying], "run g other rows -> run g rows other")
    threshold = at_rank(companions, group_ranks(companions), pattern.n - 1)
    inserted = rearrange(table[run, leaving], "run g one rows -> run (g one) rows")
    target = assign(insertion_gain(inserted, threshold))
    back = leaving.gather(1, torch.argsort(target, dim=-1)[..., None])
    return torch.cat([back, staying], dim=-1)


def _start(runs: Runs, pattern: NMPattern) -> Int[Tensor, "runs groups m"]:
    """In every run the better of two: the order as it is, and dealt."""
    dealt = deal(runs, pattern.m)
    as_it_is = torch.arange(runs.shape[-1], device=runs.device).expand_as(dealt)
    orders = torch.stack([as_it_is, dealt])
    kept = torch.stack([_kept(runs, order, pattern) for order in orders])
    better = orders.gather(0, kept.argmax(0)[None, :, None].expand_as(orders[:1]))[0]
    return rearrange(better, "run (group m) -> run group m", m=pattern.m)


def _kept(
    runs: Runs, order: Int[Tensor, "runs size"], pattern: NMPattern
) -> Float[Tensor, " runs"]:
    """The score that the N:M mask retains in each run."""
    kept = []
    for run, channels in zip(runs, order, strict=True):
        kept.append(retained_score(run[:, channels], pattern))
    return torch.tensor(kept, device=runs.device, dtype=torch.float64)
