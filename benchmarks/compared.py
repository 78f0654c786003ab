# SPDX-License-Identifier: Apache-2.0
"""What ``vision.py`` and ``encoder.py`` share: a run for each pattern, method and seed."""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from nm_permute_plugin.evaluation.pretrained import model_class
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.scores import ScoreName
from nm_permute_plugin.pruning.data import Samples
from nm_permute_plugin.pruning.learn.loop import LearnSettings
from nm_permute_plugin.pruning.learn.order_shape import OrderShape
from nm_permute_plugin.pruning.pipeline import (
    Method,
    OrderSettings,
    Record,
    permute_and_prune,
)
from nm_permute_plugin.pruning.running.loss import LossWeights
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import resolve

METHODS: dict[str, tuple[ScoreName, Method]] = {
    "magnitude": ("magnitude", "identity"),
    "wanda": ("wanda", "identity"),
    "ria": ("ria", "identity"),
    "search": ("wanda", "search"),
    "learned": ("wanda", "learned"),
}
SEEDED = ("search", "learned")
HEADS = ("pooler", "classifier")
"""In the names of linears that stay dense."""

Result = dict[str, object]
Measure = Callable[[Path, Record], Mapping[str, float]]
"""The figures of a checkpoint that was pruned, from its folder and its record."""


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """The arguments of both; a script adds its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="folder of the dense model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--validation", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--evaluate-every", type=int, default=20)
    parser.add_argument("--multiplier-rate", type=float, default=0.01)
    parser.add_argument("--divergence", type=float, default=1.0)
    parser.add_argument("--cosine", type=float, default=0.0)
    parser.add_argument("--hidden", type=float, default=0.0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path(f"{name}.json"))
    parser.add_argument("--resume", action="store_true", help="add to what --out holds")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    return parser


def compare(
    args: argparse.Namespace,
    dense: Mapping[str, float],
    samples: Callable[[int], Samples],
    measure: Measure,
) -> None:
    """
    Run and measure what is asked for, and print a table.

    :param dense: the figures of the dense model, by name; the first is the one that
        Wanda loses and other methods regain
    :param samples: to calibrate and learn with, by seed
    :param measure: the same figures of a pruned checkpoint
    """
    results = _resumed(args)
    done = {(r["pattern"], r["method"], r["seed"]) for r in results}
    for pattern in args.patterns:
        for method in args.methods:
            for seed in args.seeds if method in SEEDED else args.seeds[:1]:
                if (pattern, method, seed) in done:
                    continue
                result = _run(method, pattern, seed, args, samples(seed), measure)
                results.append(result)
                shown = {k: v for k, v in result.items() if k != "history"}
                print(json.dumps(shown), flush=True)
                # After every run: what was measured survives an interruption.
                record = {
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    "settings": _settings(args),
                    "dense": dict(dense),
                    "results": results,
                }
                args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(_table(dense, results))


def _run(
    method: str,
    pattern: str,
    seed: int,
    args: argparse.Namespace,
    samples: Samples,
    measure: Measure,
) -> Result:
    dtype = getattr(torch, args.dtype)
    model = model_class(args.model).from_pretrained(args.model, dtype=dtype)
    model = model.to(args.device).eval()
    prunable = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(head in name for head in HEADS)
    ]
    parsed = NMPattern.parse(pattern)
    heads = head_dim_of(model.config)
    resolved = resolve(model, spec_of(model), parsed, prunable, heads)
    score, how = METHODS[method]
    shape = OrderShape(multipliers=args.multiplier_rate > 0)
    learn = LearnSettings(
        steps=args.steps,
        evaluate_every=args.evaluate_every,
        multiplier_rate=args.multiplier_rate,
        shape=shape,
        loss=LossWeights(
            divergence=args.divergence, cosine=args.cosine, hidden=args.hidden
        ),
        seed=seed,
    )
    settings = OrderSettings(parsed, score=score, method=how, learn=learn)
    started = time.perf_counter()
    record = permute_and_prune(model, resolved, prunable, samples, settings)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        figures = measure(Path(folder), record)
    return {
        "pattern": pattern,
        "method": method,
        "seed": seed,
        "seconds": seconds,
        "retained": record.retained[1],
        "history": record.history,
        **figures,
    }


def _settings(args: argparse.Namespace) -> dict[str, str]:
    """What one run depends on, beside its method, pattern and seed."""
    chosen = ("methods", "patterns", "seeds", "out", "resume")
    return {k: str(v) for k, v in vars(args).items() if k not in chosen}


def _resumed(args: argparse.Namespace) -> list[Result]:
    """The results of an earlier call with the same settings, if asked for."""
    if not args.resume or not args.out.exists():
        return []
    record = json.loads(args.out.read_text())
    if record["settings"] != _settings(args):
        raise ValueError(f"{args.out} was measured with {record['settings']}")
    results: list[Result] = record["results"]
    return results


def _table(dense: Mapping[str, float], results: Sequence[Result]) -> str:
    """A row for each pattern and method, and how much of the first figure it regains."""
    first, best = next(iter(dense.items()))
    names = " | ".join(dense)
    ideal = " | ".join(f"{value:.4f}" for value in dense.values())
    lines = [
        f"| pattern | method | seeds | {names} | {first} regained | spread | seconds |",
        "|---" * (6 + len(dense)) + "|",
        f"| | dense | | {ideal} | | | |",
    ]
    base = {r["pattern"]: _float(r, first) for r in results if r["method"] == "wanda"}
    order = list(METHODS)
    results = sorted(
        results, key=lambda r: (str(r["pattern"]), order.index(str(r["method"])))
    )
    for pattern, method in dict.fromkeys((r["pattern"], r["method"]) for r in results):
        runs = [r for r in results if (r["pattern"], r["method"]) == (pattern, method)]
        means = [statistics.mean(_float(r, name) for r in runs) for name in dense]
        regained = spread = ""
        if method in SEEDED and base.get(pattern, best) < best:
            lost = best - base[pattern]
            shares = [(_float(r, first) - base[pattern]) / lost for r in runs]
            regained = f"{statistics.mean(shares):.1%}"
            spread = f"{min(shares):.1%} to {max(shares):.1%}"
        seconds = statistics.mean(_float(r, "seconds") for r in runs)
        found = " | ".join(f"{mean:.4f}" for mean in means)
        lines.append(
            f"| {pattern} | {method} | {len(runs)} | {found} | {regained} | {spread} "
            f"| {seconds:.0f} |"
        )
    return "\n".join(lines)


def _float(result: Result, key: str) -> float:
    return float(str(result[key]))
