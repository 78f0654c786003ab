# SPDX-License-Identifier: Apache-2.0
"""
Perplexity and gap closed of every method, over seeds, from reloaded checkpoints.

    python benchmarks/quality.py MODEL --train brown.txt --test wikitext-2/test.txt

Each run loads the dense model, orders and prunes it, saves it, reads it back, measures.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from nm_permute_plugin.evaluation.perplexity import (
    evaluate_checkpoint,
    gap_closed,
    tokenize,
)
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.scores import ScoreName
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import resolve
from nm_permute_plugin.training.blocks import BlockSettings
from nm_permute_plugin.training.distill import DistillSettings
from nm_permute_plugin.training.learn import LearnSettings
from nm_permute_plugin.training.orders import OrderShape
from nm_permute_plugin.training.pipeline import (
    Method,
    OrderSettings,
    permute_and_prune,
)
from nm_permute_plugin.training.recover import RecoverSettings, Stage
from nm_permute_plugin.training.text import Text, rows_of, split_text

ORDERS: dict[str, tuple[ScoreName, Method]] = {
    "magnitude": ("magnitude", "identity"),
    "wanda": ("wanda", "identity"),
    "ria": ("ria", "identity"),
    "search": ("wanda", "search"),
    "learned": ("wanda", "learned"),
    "layer_wise": ("wanda", "learned"),
}
RECOVERIES: dict[str, tuple[Stage, ...]] = {
    "rescale": ("rescale",),
    "blocks": ("blocks",),
    "end_to_end": ("end_to_end",),
    "recover": ("blocks", "end_to_end"),
}
RECOVERED = [
    f"{order}+{way}" for order in ("wanda", "search", "learned") for way in RECOVERIES
]


def main() -> None:
    args = _arguments()
    torch.manual_seed(0)
    rows = _rows(args)
    test = tokenize(args.model, "\n\n".join(f.read_text() for f in args.test))
    if args.windows is not None:
        test = test[: args.windows * args.window]
    dense = _perplexity(args.model, test, args)
    print(
        f"{_hardware(args.device)}; {len(rows)} rows of {args.sequence_length} tokens"
    )
    print(f"test windows of {args.window} tokens; dense perplexity {dense:.2f}")
    results: list[dict[str, object]] = []
    for method in args.methods:
        seeds = args.seeds if _is_random(method) else args.seeds[:1]
        for seed in seeds:
            result = _run(method, seed, rows, test, args)
            results.append(result)
            looks = ("history", "recovered")
            print(json.dumps({k: v for k, v in result.items() if k not in looks}))
            # After every run: what was measured survives an interruption.
            record = {
                "hardware": _hardware(args.device),
                "arguments": {k: str(v) for k, v in vars(args).items()},
                "dense": dense,
                "results": results,
            }
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(_table(dense, results))


def _run(
    method: str,
    seed: int,
    rows: list[torch.Tensor],
    test: torch.Tensor,
    args: argparse.Namespace,
) -> dict[str, object]:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = model.to(args.device).eval()
    order, _, recovery = method.partition("+")
    score, how = ORDERS[order]
    pattern = NMPattern.parse(args.pattern)
    prunable = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    resolved = resolve(
        model, spec_of(model), pattern, prunable, head_dim_of(model.config)
    )
    text: Text = split_text(rows, args.batch_size, args.held_back, seed)
    learn = LearnSettings(
        steps=args.steps,
        learning_rate=args.learning_rate,
        shape=OrderShape(
            row_limit=args.row_limit, multipliers=args.multiplier_rate > 0
        ),
        multiplier_rate=args.multiplier_rate,
        seed=seed,
    )
    recover = RecoverSettings(
        stages=RECOVERIES[recovery] if recovery else (),
        blocks=BlockSettings(
            window=args.recover_window,
            epochs=args.recover_epochs,
            rate=args.recover_blocks_rate,
            seed=seed,
        ),
        distill=DistillSettings(
            steps=args.recover_steps, rate=args.recover_end_to_end_rate, seed=seed
        ),
    )
    settings = OrderSettings(
        pattern,
        score=score,
        method=how,
        learn=learn,
        objective="layer_wise" if order == "layer_wise" else "end_to_end",
        recover=recover,
    )
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    record = permute_and_prune(model, resolved, prunable, text, settings)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)
        del model
        value = _perplexity(folder, test, args)
    return {
        "method": method,
        "seed": seed,
        "perplexity": value,
        "seconds": seconds,
        "stages": record.seconds,
        "peak_gib": peak,
        "fold_error": record.fold_error,
        "retained": record.retained,
        "recovered": [asdict(stage) for stage in record.recovered],
        "history": record.history,
    }


def _is_random(method: str) -> bool:
    return "+" in method or method in ("search", "learned", "layer_wise")


def _perplexity(
    folder: str | Path, test: torch.Tensor, args: argparse.Namespace
) -> float:
    return evaluate_checkpoint(folder, test, args.window, args.device, args.batch_size)


def _rows(args: argparse.Namespace) -> list[torch.Tensor]:
    """Rows of the training text in a fixed random order, so that all files mix."""
    tokens = tokenize(args.model, "\n\n".join(f.read_text() for f in args.train))
    count = len(tokens) // args.sequence_length
    rows = tokens[: count * args.sequence_length].view(count, -1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    vocabulary = int(tokens.max()) + 1
    return rows_of([{"input_ids": rows[order[: args.rows]]}], vocabulary)


def _table(dense: float, results: Sequence[dict[str, object]]) -> str:
    by_method: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for result in results:
        name = str(result["method"])
        by_method.setdefault(name, []).append(float(str(result["perplexity"])))
        seconds.setdefault(name, []).append(float(str(result["seconds"])))
    lines = ["| method | seeds | perplexity | gap closed | spread | seconds |"]
    lines += ["|---|---|---|---|---|---|", f"| dense | | {dense:.2f} | | | |"]
    base = by_method.get("wanda", [None])[0]
    for name, values in by_method.items():
        closed = spread = ""
        if base is not None and _is_random(name):
            gaps = [gap_closed(value, base, dense) for value in values]
            closed = f"{statistics.mean(gaps):.1%}"
            spread = f"{min(gaps):.1%} to {max(gaps):.1%}"
        lines.append(
            f"| {name} | {len(values)} | {statistics.mean(values):.2f} | {closed} "
            f"| {spread} | {statistics.mean(seconds[name]):.0f} |"
        )
    return "\n".join(lines)


def _hardware(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True)
    choices = [*ORDERS, *RECOVERED]
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(ORDERS),
        choices=choices,
        metavar="METHOD",
        help=", ".join(choices),
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument(
        "--windows", type=int, help="the first ones only; all if absent"
    )
    parser.add_argument(
        "--row-limit", type=int, help="see LearnablePermutationModifier"
    )
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument(
        "--multiplier-rate", type=float, default=0.03, help="0: none are learned"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--held-back", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--recover-window", type=int, default=1)
    parser.add_argument("--recover-epochs", type=int, default=4)
    parser.add_argument("--recover-steps", type=int, default=200)
    parser.add_argument("--recover-blocks-rate", type=float, default=0.01)
    parser.add_argument("--recover-end-to-end-rate", type=float, default=0.003)
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
