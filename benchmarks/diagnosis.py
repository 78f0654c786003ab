# SPDX-License-Identifier: Apache-2.0
"""
What makes learning a permutation hard, one question a subcommand, one table each.

    python benchmarks/diagnosis.py noise MODEL --train brown.txt
    python benchmarks/diagnosis.py linearisation MODEL --train brown.txt
    python benchmarks/diagnosis.py hardening MODEL --train brown.txt
    python benchmarks/diagnosis.py transfer MODEL --train brown.txt --other novel.txt

All measure on training or validation text, never on a test.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, combinations
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from methods import changes_of, settings_of
from nm_permute_plugin.maths.sinkhorn import annealed
from nm_permute_plugin.pruning.data import Batch, split_text
from nm_permute_plugin.pruning.learn.loop import Learner, learn
from nm_permute_plugin.pruning.learn.multipliers import MultipliedMask
from nm_permute_plugin.pruning.learn.swaps import GroupedMask
from nm_permute_plugin.pruning.problem import Solution
from nm_permute_plugin.pruning.running.backward import Backward
from nm_permute_plugin.pruning.running.masked import Mask, frozen
from nm_permute_plugin.pruning.settings import LearnStage, Settings
from subject import Started, load
from swaps import Swaps, Tried
from texts import text_rows

Rows = list[list[str]]


def main(argv: Sequence[str] | None = None) -> None:
    """Answer one question."""
    args = _arguments(argv)
    torch.manual_seed(args.seed)
    settings = _settings(args)
    rows = text_rows(args.model, args.train, args.rows, args.sequence_length)
    data = split_text(
        rows, settings.batch_size, settings.validation.share, settings.seed
    )
    dtype = getattr(torch, args.dtype)
    subject = load(args.model, data, settings, args.device, dtype)
    print(_markdown(args.answer(subject, args)))


def noise(subject: Started, args: argparse.Namespace) -> Rows:
    """
    Cosine similarity of the gradients of different batches, at the start of learning.

    For averages of 1, 2, 4, ... batches; no batch is in two averages. Of the costs of
    moves, only what tells one group from another counts.
    """
    problem, by_name = subject.problem, defaultdict[str, list[Tensor]](list)
    for stage in subject.settings.learn.stages:
        masks, leaves = _with_leaves(subject, stage)
        with frozen(problem.model), torch.enable_grad():
            backward = Backward(
                problem.teacher,
                partial(dict, masks),
                chain.from_iterable(leaves.values()),
                problem.data.train,
                subject.settings.memory,
                use_graph=False,
            )
            for batch in problem.data.train[: args.batches]:
                backward(batch)
                for name, tensors in leaves.items():
                    by_name[name].append(_gradient(tensors, stage == "swaps"))
    table = [["batches averaged", "tokens", *by_name]]
    count = len(next(iter(by_name.values())))
    tokens, size = subject.settings.batch_size * args.sequence_length, 1
    while size <= count // 2:
        cells = [str(size), str(size * tokens)]
        for grads in by_name.values():
            means = [
                torch.stack(grads[i : i + size]).mean(0)
                for i in range(0, count - size + 1, size)
            ]
            alike = [F.cosine_similarity(a, b, 0) for a, b in combinations(means, 2)]
            cells.append(f"{float(torch.stack(alike).mean()):.3f}")
        table.append(cells)
        size *= 2
    return table


def linearisation(subject: Started, args: argparse.Namespace) -> Rows:
    """
    Foretold and true changes of the loss by swaps of two channels, alone and together.

    ``costs`` are what learning follows, ``mask`` is the gradient of the mask for the very
    mask that comes out; ``elsewhere`` is the true change on another batch.
    """
    table = [["space", "swaps", "sets", "mean foretold", "mean true"]]
    table[0] += ["mean elsewhere", "costs: correlation", "same sign"]
    table[0] += ["mask: correlation", "same sign", "elsewhere: correlation"]
    generator = torch.Generator().manual_seed(subject.settings.seed)
    first, second = subject.problem.data.train[:2]
    for name in args.spaces or _spaces(subject):
        swaps = Swaps(subject, name, (first, second))
        for together in args.together:
            for how in ("random", "best"):
                sets = (
                    swaps.best(args.tries, together)
                    if how == "best"
                    else swaps.random(args.tries, together, generator)
                )
                tried = [swaps.try_out(pairs) for pairs in sets]
                table.append([name, f"{together} {how}", *_agreement(tried)])
    return table


def hardening(subject: Started, args: argparse.Namespace) -> Rows:
    """The validation loss of the soft permutation against the hardened one."""
    problem, settings = subject.problem, subject.settings
    table = [["step", "temperature", "soft", "hardened"]]
    ((stage, steps),) = settings.learn.schedule()

    def show(step: int, learner: Learner) -> None:
        # The masks of a learner have the temperature of its last step.
        temperature = annealed(
            max(step - 1, 0), steps, *settings.learn.published.temperature
        )
        with torch.no_grad():
            masks = learner.masks()
        soft = problem.teacher.validate(masks, problem.data.validation)
        hard = problem.validate(learner.solution())
        table.append([str(step), f"{temperature:.3f}", f"{soft:.4f}", f"{hard:.4f}"])

    show(0, subject.learner(stage))
    learn(problem, subject.start, settings, show)
    return table


def transfer(subject: Started, args: argparse.Namespace) -> Rows:
    """The loss on text of training, on validation text, and on text of another kind."""
    problem, size = subject.problem, subject.settings.batch_size
    validation = problem.data.validation
    count = sum(len(batch["input_ids"]) for batch in validation)
    rows = text_rows(args.model, [args.other], count, args.sequence_length)
    other: list[Batch] = [
        {"input_ids": torch.stack(rows[i : i + size])}
        for i in range(0, len(rows), size)
    ]
    texts: dict[str, list[Batch]] = {
        "trained on": problem.data.train[: len(validation)],
        "validation": validation,
        args.other.stem: other,
    }
    table = [["step", *texts, *(f"{name}: fell by" for name in texts)]]
    first: list[float] = []

    def show(step: int, solution: Solution) -> None:
        losses = [subject.loss(solution, of) for of in texts.values()]
        first.extend(losses[len(first) :])
        fell = [f"{1 - now / was:.1%}" for now, was in zip(losses, first, strict=True)]
        table.append([str(step), *(f"{value:.4f}" for value in losses), *fell])

    show(0, subject.start)
    learn(
        problem,
        subject.start,
        subject.settings,
        lambda step, learner: show(step, learner.solution()),
    )
    return table


def _with_leaves(
    subject: Started, stage: LearnStage
) -> tuple[dict[str, Mask], dict[str, list[Tensor]]]:
    """
    The masks of a learner at the start, and what gets their gradients, by family.

    :raises ValueError: for a stage whose masks say nothing of their parameters
    """
    masks: dict[str, Mask] = dict(subject.learner(stage).masks())
    leaves = defaultdict[str, list[Tensor]](list)
    for of in subject.problem.spaces.values():
        costs: list[Tensor] = []  # one for all consumers of the space
        for consumer in of.space.consumers:
            mask = masks[consumer.name]
            if isinstance(mask, GroupedMask):
                costs = costs or [torch.zeros_like(mask.cost).requires_grad_(True)]
                masks[consumer.name] = replace(mask, cost=costs[0])
            elif isinstance(mask, MultipliedMask):
                log = torch.zeros_like(mask.log_multiplier).requires_grad_(True)
                masks[consumer.name] = replace(mask, log_multiplier=log)
                leaves[f"{of.space.family} multipliers"].append(log)
            else:
                raise ValueError(
                    f"learn.stages names {stage}, but noise is of swaps and multipliers"
                )
        leaves[of.space.family] += costs
    return masks, {name: tensors for name, tensors in leaves.items() if tensors}


def _gradient(leaves: Sequence[Tensor], of_costs: bool) -> Tensor:
    """The gradient of all leaves as one vector on the CPU; none is left with them."""
    parts = []
    for leaf in leaves:
        assert leaf.grad is not None
        gradient, leaf.grad = leaf.grad, None
        if of_costs:
            gradient = gradient - gradient.mean(-1, keepdim=True)
        parts.append(gradient.flatten())
    return torch.cat(parts).cpu()


def _agreement(tried: Sequence[Tried]) -> list[str]:
    true = [one.true for one in tried]
    elsewhere = [one.elsewhere for one in tried]
    cells = [str(len(tried))]
    costs = [one.costs for one in tried]
    cells += [f"{statistics.mean(x):.2e}" for x in (costs, true, elsewhere)]
    for foretold in (costs, [one.linear for one in tried]):
        same = [a * b > 0 for a, b in zip(foretold, true, strict=True)]
        cells += [_correlation(foretold, true), f"{statistics.mean(same):.0%}"]
    return [*cells, _correlation(true, elsewhere)]


def _correlation(first: Sequence[float], second: Sequence[float]) -> str:
    """Pearson's; empty where one side does not vary."""
    if min(len(set(first)), len(set(second))) < 2:
        return ""
    return f"{statistics.correlation(first, second):.2f}"


def _spaces(subject: Started) -> list[str]:
    """One space of every family, from the middle of the model."""
    by_family: dict[str, list[str]] = {}
    for name, of in subject.problem.spaces.items():
        by_family.setdefault(of.space.family, []).append(name)
    return [names[len(names) // 2] for names in by_family.values()]


def _markdown(rows: Rows) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _settings(args: argparse.Namespace) -> Settings:
    """What the options say: ``amd`` hardens, all other questions are about ``learned``."""
    short = {
        "mask_structure": args.pattern,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "validation.share": args.validation_share,
        "validation.every": args.every,
        "search.rounds": args.search_rounds,
        "learn.steps": args.steps,
        "learn.stages": ["swaps", "multipliers"] if args.question == "noise" else None,
    }
    method = "amd" if args.question == "hardening" else "learned"
    return settings_of(method, changes_of([method], short, args.set))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("model", type=Path)
    add("--train", type=Path, nargs="+", required=True)
    add("--rows", type=int, default=512)
    add("--sequence-length", type=int, default=1024)
    add("--batch-size", type=int, default=Settings().batch_size)
    add("--validation-share", type=float, default=0.03)
    add("--pattern", default=Settings().mask_structure)
    rounds = Settings().search.rounds
    add(
        "--search-rounds",
        type=int,
        default=rounds,
        help="0 starts with the channels as they are",
    )
    add("--steps", type=int, default=100, help="of every stage")
    add("--every", type=int, default=10, help="steps from one validation to the next")
    add("--set", nargs="+", default=[], metavar="learned.PATH=VALUE")
    add("--seed", type=int, default=0)
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    questions = parser.add_subparsers(dest="question", required=True)
    sub: dict[str, argparse.ArgumentParser] = {}
    for answer in (noise, linearisation, hardening, transfer):
        name, text = answer.__name__, (answer.__doc__ or "").strip()
        sub[name] = questions.add_parser(name, parents=[common], description=text)
        sub[name].set_defaults(answer=answer)
    sub["noise"].add_argument("--batches", type=int, default=32)
    add = sub["linearisation"].add_argument
    add("--spaces", nargs="+", help="one of each kind if absent")
    add("--together", type=int, nargs="+", default=[1, 16], help="swaps at once")
    add("--tries", type=int, default=24, help="sets of swaps a row")
    sub["linearisation"].set_defaults(dtype="float32")  # single swaps are small
    sub["hardening"].set_defaults(steps=50, every=5)
    add = sub["transfer"].add_argument
    add("--other", type=Path, required=True, help="text of another kind")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
