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

from methods import changes_of, is_random, settings_of
from nm_permute_plugin.evaluation.pretrained import model_class
from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.pipeline import Record, permute_and_prune
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import resolve
from ways import DEFAULT as METHODS

HEADS = ("pooler", "classifier")
"""In the names of linears that stay dense."""

Result = dict[str, object]
Measure = Callable[[Path, Record], Mapping[str, float]]
"""The figures of a checkpoint that was pruned, from its folder and its record."""


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """The arguments of both; a script adds its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="folder of the dense model")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    default = Settings()
    share = default.validation.share
    parser.add_argument("--validation-share", type=float, default=share)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=120, help="of every stage")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="METHOD.PATH=VALUE",
        help="any other setting of a recipe, as in all.loss.cosine=1; see quality.py",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path(f"{name}.json"))
    parser.add_argument("--resume", action="store_true", help="add to what --out holds")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    return parser


def compare(
    args: argparse.Namespace,
    dense: Mapping[str, float],
    data: Callable[[Settings], Data],
    measure: Measure,
) -> None:
    """
    Run and measure what is asked for, and print a table.

    :param dense: the figures of the dense model, by name; the first is the one that
        Wanda loses and other methods regain
    :param data: to calibrate and learn with, split as the settings say
    :param measure: the same figures of a pruned checkpoint
    :raises ValueError: for a change of settings that no method reads
    """
    results = _resumed(args)
    done = {(r["pattern"], r["method"], r["seed"]) for r in results}
    for pattern in args.patterns:
        for method in args.methods:
            for seed in args.seeds if is_random(method) else args.seeds[:1]:
                if (pattern, method, seed) in done:
                    continue
                settings = _settings(method, pattern, seed, args)
                result = _run(method, settings, args, data(settings), measure)
                results.append(result)
                shown = {k: v for k, v in result.items() if k != "history"}
                print(json.dumps(shown), flush=True)
                # After every run: what was measured survives an interruption.
                record = {
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    "settings": _arguments(args),
                    "dense": dict(dense),
                    "results": results,
                }
                args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(_table(dense, results))


def _settings(
    method: str, pattern: str, seed: int, args: argparse.Namespace
) -> Settings:
    short = {
        "mask_structure": pattern,
        "batch_size": args.batch_size,
        "seed": seed,
        "validation.share": args.validation_share,
        "learn.steps": args.steps,
    }
    return settings_of(method, changes_of(args.methods, short, args.set))


def _run(
    method: str,
    settings: Settings,
    args: argparse.Namespace,
    data: Data,
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
    heads = head_dim_of(model.config)
    resolved = resolve(model, spec_of(model), settings.pattern, prunable, heads)
    started = time.perf_counter()
    record = permute_and_prune(model, resolved, prunable, data, settings)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        figures = measure(Path(folder), record)
    return {
        "pattern": settings.mask_structure,
        "method": method,
        "seed": settings.seed,
        "seconds": seconds,
        "retained": record.retained[1],
        "history": record.history,
        **figures,
    }


def _arguments(args: argparse.Namespace) -> dict[str, str]:
    """What one run depends on, beside its method, pattern and seed."""
    chosen = ("methods", "patterns", "seeds", "out", "resume")
    return {k: str(v) for k, v in vars(args).items() if k not in chosen}


def _resumed(args: argparse.Namespace) -> list[Result]:
    """The results of an earlier call with the same settings, if asked for."""
    if not args.resume or not args.out.exists():
        return []
    record = json.loads(args.out.read_text())
    if record["settings"] != _arguments(args):
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
    results = sorted(
        results, key=lambda r: (str(r["pattern"]), METHODS.index(str(r["method"])))
    )
    for pattern, method in dict.fromkeys((r["pattern"], r["method"]) for r in results):
        runs = [r for r in results if (r["pattern"], r["method"]) == (pattern, method)]
        means = [statistics.mean(_float(r, name) for r in runs) for name in dense]
        regained = spread = ""
        if is_random(str(method)) and base.get(pattern, best) < best:
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
