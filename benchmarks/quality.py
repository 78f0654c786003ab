# SPDX-License-Identifier: Apache-2.0
"""
Perplexity and gap closed of every method, over seeds, from reloaded checkpoints.

    python benchmarks/quality.py MODEL --train brown.txt --test wikitext-2/test.txt
    python benchmarks/quality.py --merge a.json b.json --plot quality.png

Each run loads the dense model, permutes and prunes it, saves it, reads it back, measures
its perplexity and how near its predictions are to the dense model's, and with
``--hellaswag FILE`` how many items of HellaSwag it answers; lm-eval is not needed. What
methods of one seed share is found once: the seconds of the first are the whole cost.
Methods that end in ``-free`` permute the inputs of every linear alone, as published; what
they find cannot be folded. ``free-mask`` learns the mask and no permutation, which is an
upper bound.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from judged import Judge, judged_table
from methods import (
    Change,
    Variant,
    changes_of,
    is_random,
    prune,
    settings_of,
    variants_of,
)
from nm_permute_plugin.pruning.data import Row, split_text
from nm_permute_plugin.pruning.session import session
from nm_permute_plugin.pruning.settings import Settings
from report import Record, check_protocol, merged, plot, read, table, write
from tasks.hellaswag_file import read_items
from texts import text_rows, text_windows
from ways import DEFAULT, METHODS


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    args = arguments(argv)
    if args.merge:
        record = merged([read(path) for path in args.merge])
        if args.out:
            write(record, args.out)
    else:
        record = _measure(args)
    print("\n\n".join(filter(None, [table(record), judged_table(record)])))
    if args.plot:
        plot(record, args.plot)


def _measure(args: argparse.Namespace) -> Record:
    """
    Run every method and seed; the record is written after each.

    :raises ValueError: for a change of settings that no method reads
    """
    # Refuses before the work, not after.
    variants = variants_of(args.methods, asked(args, seed=0), args.vary)
    torch.manual_seed(0)
    out = args.out or Path("quality.json")
    arguments = {k: str(v) for k, v in vars(args).items()}
    results: list[Record] = []
    if args.resume and out.exists():
        before = read(out)
        check_protocol(arguments, before["arguments"])
        results = before["results"]
    rows = text_rows(args.model, args.train, args.rows, args.sequence_length)
    test = text_windows(args.model, args.test, args.window, args.stream, args.windows)
    items = read_items(args.hellaswag)[: args.items] if args.hellaswag else []
    judge = Judge(args.model, test, items, args.device, args.batch_size)
    dense = judge.of_dense()
    record: Record = {
        "hardware": _hardware(args.device),
        "arguments": arguments,
        "dense": dense["perplexity"],
        "dense_hellaswag": dense.get("hellaswag"),
        "results": results,
    }
    print(f"{record['hardware']}; {len(rows)} rows of {args.sequence_length} tokens")
    print(f"windows of {args.window} tokens; dense perplexity {record['dense']:.2f}")
    done = {(result["method"], result["seed"]) for result in results}
    first = args.seeds[0]
    for seed in args.seeds:
        # The search and the masks of a seed are found once for all its methods.
        with session():
            for variant in variants:
                if (variant.name, seed) in done:
                    continue
                if seed != first and not is_random(variant.method):
                    continue
                result = _run(variant, seed, rows, judge, args)
                results.append(result)
                long = ("history", "recovered", "settings", "hellaswag")
                shown = {k: v for k, v in result.items() if k not in long}
                print(json.dumps(shown), flush=True)
                # After every run: what was measured survives an interruption.
                write(record, out)
    return record


def _run(
    variant: Variant,
    seed: int,
    rows: list[Row],
    judge: Judge,
    args: argparse.Namespace,
) -> Record:
    """One method with one seed: prune, save, read back, measure."""
    method = variant.method
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = model.to(args.device).eval()
    settings = settings_of(method, [*asked(args, seed), *variant.changes])
    data = split_text(
        rows, settings.batch_size, settings.validation.share, settings.seed
    )
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    outcome = prune(model, args.model, method, data, settings)
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)
        del model
        measured = judge.of(folder)
    return {
        "method": variant.name,
        "seed": seed,
        **measured,
        "tokens": outcome.batches * settings.batch_size * args.sequence_length,
        "peak_gib": peak,
        **asdict(outcome),
    }


def asked(args: argparse.Namespace, seed: int) -> list[Change]:
    """What the options say of the settings: ``--set`` above the short forms."""
    short = {
        "mask_structure": args.pattern,
        "batch_size": args.batch_size,
        "seed": seed,
        "validation.share": args.validation_share,
        "learn.steps": args.steps,
        "recover.end_to_end.steps": args.recover_steps,
    }
    return changes_of(args.methods, short, args.set)


def _hardware(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, Settings()
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
    add("--pattern", default=default.mask_structure)
    add("--rows", type=int, default=2048)
    add("--sequence-length", type=int, default=1024)
    add("--window", type=int, default=2048)
    add("--windows", type=int, help="the first ones only; all if absent")
    add(
        "--stream",
        action="store_true",
        help="test on one stream of tokens, as published tables do; by default every "
        "window begins as the tokenizer begins a text. The same for a tokenizer that "
        "adds nothing, such as SmolLM2's",
    )
    add(
        "--hellaswag",
        type=Path,
        help="a file with six lines an item: context, number of the right ending, four "
        "endings",
    )
    add("--items", type=int, help="of --hellaswag, the first ones only; all if absent")
    add("--batch-size", type=int, default=default.batch_size)
    add("--validation-share", type=float, default=0.01)
    steps = default.learn.steps
    add("--steps", type=int, default=steps, help="of every stage that learns")
    steps = default.recover.end_to_end.steps
    add("--recover-steps", type=int, default=steps, help="of the recovery end_to_end")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="METHOD.PATH=VALUE",
        help="any other setting of a recipe, as in learned.learn.multipliers.rate=0.02 or "
        "all.recover.end_to_end.rate=0.001; `all` are the methods that read it",
    )
    add(
        "--vary",
        nargs="+",
        default=[],
        metavar="METHOD.PATH=[VALUES]",
        help="run the methods that read a setting once more with each value, as in "
        "learned+end_to_end.recover.end_to_end.steps=[1000, 3000]",
    )
    add("--out", type=Path, help="the record; quality.json if absent")
    add("--resume", action="store_true", help="keep the results that --out holds")
    add("--merge", type=Path, nargs="+", help="show these records as one; runs nothing")
    add("--plot", type=Path, help="a picture of the gaps closed")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not args.merge and not (args.model and args.train and args.test):
        parser.error("give a model, --train and --test, or --merge")
    return args


if __name__ == "__main__":
    main()
