# SPDX-License-Identifier: Apache-2.0
"""
Our search against RIA's assignment step as published, at one layer's shape.

    python benchmarks/search_speed.py --rows 4096 --channels 11008

Both start from RIA's channel allocation. RIA's loop scores every group by inserting every
free channel and taking the top N anew, once; ours does rounds until it retains as much.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import count

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nm_permute_plugin.maths.allocation import allocate
from nm_permute_plugin.maths.masks import retained_score
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning import search
from nm_permute_plugin.pruning.problem import SpaceScores
from nm_permute_plugin.specs.spec import Consumer, Space


def ria_assignment(score: Tensor, allocated: Tensor, pattern: NMPattern) -> Tensor:
    """One round of RIA's refinement for the first slot, group by group."""
    groups = allocated.view(-1, pattern.m).clone()
    free, fixed = groups[:, 0].clone(), groups[:, 1:]
    retained = torch.empty(len(groups), len(groups), device=score.device)
    for group, companions in enumerate(fixed):
        stays = score[:, companions][:, None].expand(-1, len(free), -1)
        joined = torch.cat([stays, score[:, free][..., None]], dim=-1)
        retained[:, group] = joined.topk(pattern.n, dim=-1).values.sum((0, 2))
    rows, columns = linear_sum_assignment(retained.cpu().numpy(), maximize=True)
    groups[torch.as_tensor(columns), 0] = free[torch.as_tensor(rows)]
    return groups.flatten()


def our_search(score: Tensor, pattern: NMPattern, rounds: int) -> Tensor:
    """The permutation after so many rounds; the newest validates best."""
    consumer = Consumer("linear")
    space = Space("hidden", score.shape[1], score.shape[1], (consumer,))
    spaces = {space.name: SpaceScores.of(space, {consumer.name: score})}
    newest = count(0, -1)
    perms, _ = search.search(spaces, pattern, rounds, 0, lambda _: next(newest))
    return perms[space.name]


def main() -> None:
    """Run both sides at the shape that the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--pattern", default="2:4")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    args = parser.parse_args()
    pattern = NMPattern.parse(args.pattern)
    generator = torch.Generator().manual_seed(0)
    # Heavy-tailed channels, as Wanda's scores of a real layer have.
    scale = torch.randn(args.channels, generator=generator).exp()
    score = torch.randn(args.rows, args.channels, generator=generator).abs() * scale
    score = score.to(args.device)
    allocated = allocate(score, pattern.m)
    start = retained_score(score[:, allocated], pattern)
    theirs, slow = _timed(partial(ria_assignment, score, allocated, pattern), score)
    best = retained_score(score[:, theirs], pattern) - start
    print(f"retained score of the channel allocation: {start:.1f}")
    print(f"RIA as published: {slow:.3f} s, + {best:.1f} ({best / slow:.2f} a second)")
    search.ROUNDS_BETWEEN_VALIDATIONS = 1  # any number of rounds can be asked for then
    ours = partial(our_search, score[:, allocated], pattern)
    ours(1)  # warm up; RIA's loop is too slow to do so, and needs it less
    for rounds in count(1):
        inner, fast = _timed(partial(ours, rounds), score)
        gained = retained_score(score[:, allocated[inner]], pattern) - start
        print(
            f"ours, {rounds} rounds: {fast:.3f} s, + {gained:.1f}; ours / RIA, score "
            f"gained a second: {gained / fast / (best / slow):.1f}"
        )
        if gained >= best:
            break


def _timed(run: Callable[[], Tensor], score: Tensor) -> tuple[Tensor, float]:
    if score.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    perm = run()
    if score.is_cuda:
        torch.cuda.synchronize()
    return perm, time.perf_counter() - started


if __name__ == "__main__":
    main()
