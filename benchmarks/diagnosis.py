# SPDX-License-Identifier: Apache-2.0
"""
What makes learning an order hard, one question a subcommand, one table each.

    python benchmarks/diagnosis.py noise MODEL --train brown.txt
    python benchmarks/diagnosis.py linearisation MODEL --train brown.txt
    python benchmarks/diagnosis.py hardening MODEL --train brown.txt
    python benchmarks/diagnosis.py transfer MODEL --train brown.txt --other novel.txt

All look at text that is trained on or held back, never at a test.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods import Way, changed, parse_changes, ways
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.learn.loop import LearnSettings, frozen
from nm_permute_plugin.pruning.learn.order_shape import Learns
from nm_permute_plugin.pruning.learn.orders import LearnableOrders
from nm_permute_plugin.pruning.problem import mean_loss
from nm_permute_plugin.pruning.running.backward import BackwardStep
from nm_permute_plugin.pruning.running.masked import Mask
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.text import split_text
from subject import Started, learn, load
from swaps import Swaps, Tried
from texts import text_rows

Rows = list[list[str]]


def main(argv: Sequence[str] | None = None) -> None:
    """Answer one question."""
    args = _arguments(argv)
    torch.manual_seed(args.seed)
    rows = text_rows(args.model, args.train, args.rows, args.sequence_length)
    text = split_text(rows, args.batch_size, args.validation, args.seed)
    pattern = NMPattern.parse(args.pattern)
    dtype = getattr(torch, args.dtype)
    subject = load(
        args.model, text, pattern, args.search_rounds, args.seed, args.device, dtype
    )
    way = "amd" if args.question == "hardening" else "learned"
    ours = LearnSettings()
    ours = replace(ours, shape=replace(ours.shape, multipliers=args.multipliers))
    chosen: Way = changed(ways(ours)[way], parse_changes(args.set).get(way, {}))
    settings = replace(
        chosen.learn, steps=args.steps, seed=args.seed, evaluate_every=args.every
    )
    print(_markdown(args.answer(subject, settings, args)))


def noise(subject: Started, settings: LearnSettings, args: argparse.Namespace) -> Rows:
    """
    Cosine similarity of the gradients of different batches, at the start of learning.

    For averages of 1, 2, 4, ... batches; no batch is in two averages. Of orders, only what
    tells one group from another counts.
    """
    orders = subject.orders(settings)
    kinds: list[Learns] = ["order"]
    kinds += ["multipliers"] if settings.shape.multipliers else []
    parameters: dict[str, list[nn.Parameter]] = {}
    for what in kinds:
        for bundle in orders.bundles:
            family = bundle.stacks[0].space.family
            name, parameter = family, bundle.choice
            if what == "multipliers":
                name, parameter = f"{family} multipliers", bundle.log_multiplier
            parameters.setdefault(name, []).append(parameter)

    def masks() -> dict[str, Mask]:
        return {**subject.others, **orders.at(settings.temperature[0], 0).masks()}

    by_name: dict[str, list[Tensor]] = {name: [] for name in parameters}
    teacher = Teacher(subject.model, settings.loss)
    backward = BackwardStep(subject.model, masks, settings.loss, teacher=teacher)
    for batch in subject.samples.train[: args.batches]:
        for what in kinds:
            orders.learn(what)
            with frozen(subject.model), torch.enable_grad():
                backward(batch)
        for bundle in orders.bundles:
            bundle.choice.grad -= bundle.choice.grad.mean(-1, keepdim=True)
        for name, tensors in parameters.items():
            grads = [x.grad.flatten() for x in tensors if x.grad is not None]
            by_name[name].append(torch.cat(grads).cpu())
            for tensor in tensors:
                tensor.grad = None
    table = [["batches averaged", "tokens", *by_name]]
    count = len(next(iter(by_name.values())))
    size = 1
    while size <= count // 2:
        cells = [str(size), str(size * args.batch_size * args.sequence_length)]
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


def linearisation(
    subject: Started, settings: LearnSettings, args: argparse.Namespace
) -> Rows:
    """
    Foretold and true changes of the loss by swaps of two channels, alone and together.

    ``costs`` are what learning follows, ``mask`` is the gradient of the mask for the very
    mask that comes out; ``elsewhere`` is the true change on another batch.
    """
    table = [["space", "swaps", "sets", "mean foretold", "mean true"]]
    table[0] += ["mean elsewhere", "costs: correlation", "same sign"]
    table[0] += ["mask: correlation", "same sign", "elsewhere: correlation"]
    generator = torch.Generator().manual_seed(args.seed)
    first, second = subject.samples.train[:2]
    for name in args.spaces or _spaces(subject):
        swaps = Swaps(subject, name, (first, second), settings.loss)
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


def hardening(
    subject: Started, settings: LearnSettings, args: argparse.Namespace
) -> Rows:
    """The validation loss of the soft order against the hardened one."""
    table = [["step", "temperature", "soft", "hardened"]]
    validation, weights = subject.samples.validation, settings.loss

    def watch(step: int, temperature: float, orders: LearnableOrders) -> None:
        with torch.no_grad():
            masks = {**subject.others, **orders.at(temperature, step).masks()}
        soft = mean_loss(subject.model, masks, validation, weights)
        hard = subject.loss(orders, validation, weights)
        table.append([str(step), f"{temperature:.3f}", f"{soft:.4f}", f"{hard:.4f}"])

    learn(subject, settings, watch)
    return table


def transfer(
    subject: Started, settings: LearnSettings, args: argparse.Namespace
) -> Rows:
    """The loss on text of training, on validation text, and on text of another kind."""
    validation = subject.samples.validation
    count = sum(len(batch["input_ids"]) for batch in validation)
    rows = text_rows(args.model, [args.other], count, args.sequence_length)
    other = [
        {"input_ids": torch.stack(rows[i : i + args.batch_size])}
        for i in range(0, len(rows), args.batch_size)
    ]
    texts = {
        "trained on": subject.samples.train[: len(validation)],
        "held back": validation,
        args.other.stem: other,
    }
    table = [["step", *texts, *(f"{name}: fell by" for name in texts)]]
    first: list[float] = []

    def watch(step: int, _: float, orders: LearnableOrders) -> None:
        losses = [subject.loss(orders, of, settings.loss) for of in texts.values()]
        first.extend(losses[len(first) :])
        fell = [f"{1 - now / was:.1%}" for now, was in zip(losses, first, strict=True)]
        table.append([str(step), *(f"{value:.4f}" for value in losses), *fell])

    learn(subject, settings, watch)
    return table


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
    for name, stack in subject.stacks.items():
        by_family.setdefault(stack.space.family, []).append(name)
    return [names[len(names) // 2] for names in by_family.values()]


def _markdown(rows: Rows) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("model", type=Path)
    add("--train", type=Path, nargs="+", required=True)
    add("--rows", type=int, default=512)
    add("--sequence-length", type=int, default=1024)
    add("--batch-size", type=int, default=8)
    add("--validation", type=float, default=0.03)
    add("--pattern", default="2:4")
    add("--search-rounds", type=int, default=12, help="0: from the order as it is")
    add("--no-multipliers", dest="multipliers", action="store_false")
    add("--steps", type=int, default=100, help="of the whole schedule")
    add("--every", type=int, default=10, help="steps between two looks")
    add("--set", nargs="+", default=[], metavar="learned.FIELD=VALUE")
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
