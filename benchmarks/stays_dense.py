# SPDX-License-Identifier: Apache-2.0
"""
What stays dense under a budget: the order of ``budget`` beside other orders.

    python benchmarks/stays_dense.py MODEL OUT.json --train own.txt --test test.txt

Masks are found once. Each order leaves groups of linears dense up to some shares of the
weights, and the loss (KL divergence from the dense model) is measured on windows of the
test text, which chose nothing. With ``--then STEPS`` the masks of what stays sparse are
learned before that, from the search's masks, as a budget does: it chooses under the
search's masks, and ``--steps`` chooses under learned ones instead.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from methods import for_all, settings_of
from nm_permute_plugin.pruning.budget.choice import Order
from nm_permute_plugin.pruning.budget.fused import FusedLinears, fused_linears
from nm_permute_plugin.pruning.budget.shares import shares_of_loss
from nm_permute_plugin.pruning.data import Batch, split_text
from nm_permute_plugin.pruning.figures import figures_of
from nm_permute_plugin.pruning.learn.loop import learn
from nm_permute_plugin.pruning.settings import MemorySettings, Settings
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import resolve
from subject import Started, load
from texts import text_rows, text_windows

Masks = dict[str, Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the orders, print a table and write the record."""
    args = _arguments(argv)
    settings = settings_of("learned", for_all({"learn.steps": max(args.steps, 1)}))
    rows = text_rows(args.model, args.train, args.rows, args.sequence_length)
    data = split_text(rows, args.batch_size, settings.validation.share, settings.seed)
    dtype = getattr(torch, args.dtype)
    subject = load(args.model, data, settings, args.device, dtype)
    solution = subject.start
    if args.steps:
        solution, _ = learn(subject.problem, solution, settings)
    masks = subject.problem.masks(solution)
    groups = groups_of(subject)
    windows = text_windows(
        args.model, [args.test], args.sequence_length, False, args.windows
    )
    test: list[Batch] = [{"input_ids": window[None]} for window in windows]
    found = {"command": vars(args) | {"argv": argv}, "rows": []}
    found["device"] = (
        torch.cuda.get_device_name() if args.device == "cuda" else args.device
    )
    shares, then = args.shares, args.then

    def loss_of(dense: set[int]) -> float:
        """The loss on the test text with some groups dense, learned if that is asked."""
        if not then:
            return loss_without(subject, masks, groups, dense, test)
        left = {n for i, g in enumerate(groups) if i not in dense for n in g.linears}
        rest = subject.problem.only(left)
        again = settings_of("learned", for_all({"learn.steps": then}))
        learned, _ = learn(rest, subject.start, again)
        return rest.teacher.validate(rest.masks(learned), test)

    print("| order | seconds | " + " | ".join(f"{s:.0%} dense" for s in shares) + " |")
    print("|---" * (len(shares) + 2) + "|")
    for name, order, seconds in orders(subject, solution, masks, groups, args):
        losses = [loss_of(order.up_to_share(share)) for share in shares]
        found["rows"].append({"order": name, "seconds": seconds, "losses": losses})
        cells = " | ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {name} | {seconds:.1f} | {cells} |", flush=True)
    all_sparse = loss_of(set())
    print(f"\nAll sparse: {all_sparse:.4f}")
    args.out.write_text(json.dumps(found | {"all_sparse": all_sparse}, default=str))


def groups_of(subject: Started) -> list[FusedLinears]:
    """The groups of the linears that are pruned."""
    model, linears = subject.problem.model, subject.problem.linears
    there = [name for name, _ in model.named_modules() if name in set(linears)]
    head_dim = head_dim_of(model.config)  # type: ignore[arg-type]
    spec = spec_of(model)
    resolved = resolve(model, spec, subject.settings.pattern, there, head_dim)
    return fused_linears(model, resolved, there)


def orders(subject, solution, masks: Masks, groups, args):
    """Yield every order with its name and the seconds that finding it took."""

    def by(worth: Sequence[float]) -> Order:
        each = [w / group.weights for w, group in zip(worth, groups, strict=True)]
        return Order(groups, (), sorted(range(len(groups)), key=lambda i: -each[i]))

    problem = subject.problem
    validation, teacher = problem.data.validation, problem.teacher
    teacher.validate({}, validation)  # the dense model runs before anything is timed
    started = time.perf_counter()
    shares = shares_of_loss(teacher, masks, groups, validation, MemorySettings())
    took = time.perf_counter() - started
    yield "integrated gradients (budget)", by(shares.tolist()), took
    if args.alone:
        started = time.perf_counter()
        everything = set(range(len(groups)))
        sparse = loss_without(subject, masks, groups, set(), validation)
        opened = [
            sparse - loss_without(subject, masks, groups, {i}, validation)
            for i in range(len(groups))
        ]
        took = time.perf_counter() - started
        yield "opened alone", by(opened), took
        started = time.perf_counter()
        closed = [
            loss_without(subject, masks, groups, everything - {i}, validation)
            for i in range(len(groups))
        ]
        yield "closed alone", by(closed), time.perf_counter() - started
    names = [name for group in groups for name in group.linears]
    figures = figures_of(problem, solution, masks, names).linears
    cost = {one.name: one.cost_after or 0.0 for one in figures}
    yield "layer error", by([sum(cost[n] for n in g.linears) for g in groups]), 0.0
    middle = (len(groups) - 1) / 2
    ends = [abs(i - middle) * group.weights for i, group in enumerate(groups)]
    yield "first and last layers", by(ends), 0.0
    for seed in range(args.random):
        drawn = list(range(len(groups)))
        random.Random(seed).shuffle(drawn)
        yield f"random, seed {seed}", Order(groups, (), drawn), 0.0


def loss_without(
    subject: Started,
    masks: Masks,
    groups: Sequence[FusedLinears],
    dense: set[int],
    batches: Sequence[Batch],
) -> float:
    """The loss where some groups are dense."""
    left = {n for i, g in enumerate(groups) if i not in dense for n in g.linears}
    kept = {name: mask for name, mask in masks.items() if name in left}
    return subject.problem.teacher.validate(kept, batches)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path)
    add("out", type=Path)
    add("--train", type=Path, nargs="+", required=True)
    add("--test", type=Path, required=True)
    add("--rows", type=int, default=768)
    add("--sequence-length", type=int, default=1024)
    add("--batch-size", type=int, default=Settings().batch_size)
    add("--windows", type=int, default=64, help="of the test text")
    add(
        "--steps",
        type=int,
        default=0,
        help="of multipliers, before the choice; 0 chooses under the search's masks",
    )
    add("--then", type=int, default=0, help="steps of multipliers after the choice")
    add("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.35, 0.5])
    add("--alone", action="store_true", help="measure every group alone as well")
    add("--random", type=int, default=2, help="random orders")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
