# SPDX-License-Identifier: Apache-2.0
"""
Our search against RIA's assignment step as published, at one layer's shape.

    python benchmarks/search_speed.py --rows 4096 --channels 11008

Both start from RIA's dealt order. RIA's loop scores every group by inserting every free
channel and taking the top N anew, once; ours does rounds until it retains as much.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import count

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nm_permute_plugin.maths.masks import retained_score
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.search import deal, search_order


def ria_assignment(score: Tensor, order: Tensor, pattern: NMPattern) -> Tensor:
    """One round of RIA's refinement for the first slot, group by group."""
    groups = order.view(-1, pattern.m).clone()
    free, fixed = groups[:, 0].clone(), groups[:, 1:]
    retained = torch.empty(len(groups), len(groups), device=score.device)
    for group, companions in enumerate(fixed):
        stays = score[:, companions][:, None].expand(-1, len(free), -1)
        joined = torch.cat([stays, score[:, free][..., None]], dim=-1)
        retained[:, group] = joined.topk(pattern.n, dim=-1).values.sum((0, 2))
    rows, columns = linear_sum_assignment(retained.cpu().numpy(), maximize=True)
    groups[torch.as_tensor(columns), 0] = free[torch.as_tensor(rows)]
    return groups.flatten()


def main() -> None:
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
    dealt = deal(score, pattern.m)
    start = retained_score(score[:, dealt], pattern)
    theirs, slow = _timed(partial(ria_assignment, score, dealt, pattern), score)
    best = retained_score(score[:, theirs], pattern) - start
    print(f"retained score of the dealt order: {start:.1f}")
    print(f"RIA as published: {slow:.3f} s, + {best:.1f} ({best / slow:.2f} a second)")
    search = partial(search_order, score[:, dealt], pattern)
    search(rounds=1)  # warm up; RIA's loop is too slow to do so, and needs it less
    for rounds in count(1):
        inner, fast = _timed(partial(search, rounds=rounds), score)
        gained = retained_score(score[:, dealt[inner]], pattern) - start
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
    order = run()
    if score.is_cuda:
        torch.cuda.synchronize()
    return order, time.perf_counter() - started


if __name__ == "__main__":
    main()
