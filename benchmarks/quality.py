# SPDX-License-Identifier: Apache-2.0
"""
Perplexity and gap closed of every method, over seeds, from reloaded checkpoints.

    python benchmarks/quality.py MODEL --train brown.txt --test wikitext-2/test.txt
    python benchmarks/quality.py --merge a.json b.json --plot quality.png

Each run loads the dense model, orders and prunes it, saves it, reads it back, measures.
Methods that end in ``-free`` order the inputs of every linear alone, as published; what
they find cannot be folded. ``free-mask`` learns the mask and no order: an upper bound.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from methods import DEFAULT, METHODS, Budget, is_random, parse_changes, prune
from nm_permute_plugin.evaluation.perplexity import evaluate_checkpoint, tokenize
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.learn.loop import LearnSettings
from nm_permute_plugin.pruning.recover.blocks import BlockSettings
from nm_permute_plugin.pruning.recover.distill import DistillSettings
from nm_permute_plugin.pruning.recover.stages import RecoverSettings
from nm_permute_plugin.pruning.text import Row, split_text
from report import Record, check_protocol, merged, plot, read, table, write
from texts import text_rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    args = _arguments(argv)
    if args.merge:
        record = merged([read(path) for path in args.merge])
        if args.out:
            write(record, args.out)
    else:
        record = _measure(args)
    print(table(record))
    if args.plot:
        plot(record, args.plot)


def _measure(args: argparse.Namespace) -> Record:
    """Run every method and seed; the record is written after each."""
    torch.manual_seed(0)
    out = args.out or Path("quality.json")
    arguments = {k: str(v) for k, v in vars(args).items()}
    results: list[Record] = []
    if args.resume and out.exists():
        before = read(out)
        check_protocol(arguments, before["arguments"])
        results = before["results"]
    rows = text_rows(args.model, args.train, args.rows, args.sequence_length)
    test = tokenize(args.model, "\n\n".join(f.read_text() for f in args.test))
    if args.windows is not None:
        test = test[: args.windows * args.window]
    record: Record = {
        "hardware": _hardware(args.device),
        "arguments": arguments,
        "dense": _perplexity(args.model, test, args),
        "results": results,
    }
    print(f"{record['hardware']}; {len(rows)} rows of {args.sequence_length} tokens")
    print(f"windows of {args.window} tokens; dense perplexity {record['dense']:.2f}")
    done = {(result["method"], result["seed"]) for result in results}
    for method in args.methods:
        for seed in args.seeds if is_random(method) else args.seeds[:1]:
            if (method, seed) in done:
                continue
            result = _run(method, seed, rows, test, args)
            results.append(result)
            looks = ("history", "recovered", "settings")
            shown = {k: v for k, v in result.items() if k not in looks}
            print(json.dumps(shown), flush=True)
            # After every run: what was measured survives an interruption.
            write(record, out)
    return record


def _run(
    method: str,
    seed: int,
    rows: list[Row],
    test: torch.Tensor,
    args: argparse.Namespace,
) -> Record:
    """One method with one seed: prune, save, read back, measure."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = model.to(args.device).eval()
    text = split_text(rows, args.batch_size, args.validation, seed)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    outcome = prune(model, args.model, method, text, _budget(args, seed))
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
        "tokens": outcome.batches * args.batch_size * args.sequence_length,
        "peak_gib": peak,
        **asdict(outcome),
    }


def _budget(args: argparse.Namespace, seed: int) -> Budget:
    """What all methods get; an option that was not given is the package's default."""
    ours = LearnSettings()
    if args.multiplier_rate is not None:
        ours = replace(ours, multiplier_rate=args.multiplier_rate)
    shape = replace(ours.shape, multipliers=ours.multiplier_rate > 0)
    if args.row_limit is not None:
        shape = replace(shape, row_limit=args.row_limit)
    recover = RecoverSettings(
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
    return Budget(
        NMPattern.parse(args.pattern),
        args.steps,
        seed,
        replace(ours, shape=shape),
        recover,
        parse_changes(args.set),
    )


def _perplexity(
    folder: str | Path, test: torch.Tensor, args: argparse.Namespace
) -> float:
    return evaluate_checkpoint(folder, test, args.window, args.device, args.batch_size)


def _hardware(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, nargs="?")
    add("--train", type=Path, nargs="+")
    add("--test", type=Path, nargs="+")
    add(
        "--methods",
        nargs="+",
        default=DEFAULT,
        choices=METHODS,
        metavar="METHOD",
        help=", ".join(METHODS),
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--pattern", default="2:4")
    add("--rows", type=int, default=2048)
    add("--sequence-length", type=int, default=1024)
    add("--window", type=int, default=2048)
    add("--windows", type=int, help="the first ones only; all if absent")
    add("--batch-size", type=int, default=8)
    add("--validation", type=float, default=0.01)
    add("--steps", type=int, default=200, help="of every method that learns")
    add("--row-limit", type=int, help="of ours; see LearnablePermutationModifier")
    add("--multiplier-rate", type=float, help="of ours; 0: none are learned")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="METHOD.FIELD=VALUE",
        help="another setting of one method, as in amd.learning_rate=0.03",
    )
    add("--recover-window", type=int, default=1)
    add("--recover-epochs", type=int, default=4)
    add("--recover-steps", type=int, default=200)
    add("--recover-blocks-rate", type=float, default=0.01)
    add("--recover-end-to-end-rate", type=float, default=0.003)
    add("--out", type=Path, help="the record; quality.json if absent")
    add("--resume", action="store_true", help="keep the results that --out holds")
    add("--merge", type=Path, nargs="+", help="show these records as one; runs nothing")
    add("--plot", type=Path, help="a picture of the gaps closed")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default)
    args = parser.parse_args(argv)
    if not args.merge and not (args.model and args.train and args.test):
        parser.error("give a model, --train and --test, or --merge")
    return args


if __name__ == "__main__":
    main()
