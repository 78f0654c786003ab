# SPDX-License-Identifier: Apache-2.0
"""
What the token that begins a text is worth to calibration, learning and evaluation.

    python benchmarks/beginning.py MODEL --begin "<|endoftext|>" --train own.txt \
        --test wikitext-2/test.txt

The model was trained on documents that begin with the token. Rows and windows are cut
with it and without it, whatever the tokenizer does by itself: every method is calibrated
on both kinds of rows, and measured on both kinds of windows.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from methods import changes_of, prune, settings_of
from nm_permute_plugin.evaluation.corpus import read_corpus
from nm_permute_plugin.evaluation.perplexity import perplexity
from nm_permute_plugin.evaluation.report import gap_closed
from nm_permute_plugin.evaluation.text import TextTokenizer, Window
from nm_permute_plugin.pruning.data import Row, split_text

METHODS = ("wanda", "learned")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, and print a table."""
    args = _arguments(argv)
    cuts = {"without": _tokenizer(args, ""), "with": _tokenizer(args, args.begin)}
    tests = {name: _windows(cut, args) for name, cut in cuts.items()}
    print(
        f"{args.begin} begins rows of {args.sequence_length}, windows of {args.window}"
    )
    print("| method | rows | perplexity without | with | gap closed, measured with |")
    print("|---|---|---|---|---|")
    dense = _perplexities(_load(args), tests)
    print(f"| dense | | {dense['without']:.2f} | {dense['with']:.2f} | |", flush=True)
    base = None  # Wanda, calibrated without the token
    for method in METHODS:
        for name, cut in cuts.items():
            found = _perplexities(_pruned(method, _rows(cut, args), args), tests)
            base = base or found["with"]
            gap = gap_closed(found["with"], base, dense["with"])
            values = f"{found['without']:.2f} | {found['with']:.2f}"
            print(f"| {method} | {name} | {values} | {gap:.1%} |", flush=True)


def _tokenizer(args: argparse.Namespace, begin: str) -> TextTokenizer:
    """
    The model's tokenizer, with what begins a text replaced.

    :raises ValueError: if it is not one token
    """
    text = TextTokenizer(args.model)
    ids = text.tokenizer(begin, add_special_tokens=False).input_ids if begin else []
    if len(ids) > 1:
        raise ValueError(f"--begin {begin!r} is {len(ids)} tokens of this tokenizer")
    text.begin = list(ids)
    return text


def _rows(cut: TextTokenizer, args: argparse.Namespace) -> list[Row]:
    rows = cut.rows(read_corpus(args.train), args.sequence_length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [torch.tensor(rows[i]) for i in order[: args.rows].tolist()]


def _windows(cut: TextTokenizer, args: argparse.Namespace) -> list[Window]:
    return list(cut.windows(read_corpus(args.test), args.window).windows)


def _load(args: argparse.Namespace) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    moved: torch.nn.Module = model.to(args.device).eval()
    return moved


def _pruned(method: str, rows: list[Row], args: argparse.Namespace) -> torch.nn.Module:
    short = {
        "batch_size": args.batch_size,
        "validation.share": args.validation_share,
        "learn.steps": args.steps,
    }
    settings = settings_of(method, changes_of([method], short, []))
    data = split_text(
        rows, settings.batch_size, settings.validation.share, settings.seed
    )
    model = _load(args)
    prune(model, args.model, method, data, settings)
    return model


def _perplexities(
    model: torch.nn.Module, tests: dict[str, list[Window]]
) -> dict[str, float]:
    return {name: perplexity(model, test, 8) for name, test in tests.items()}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path)
    add("--begin", required=True, help="the token that begins a text")
    add("--train", type=Path, nargs="+", required=True)
    add("--test", type=Path, nargs="+", required=True)
    add("--rows", type=int, default=1024)
    add("--sequence-length", type=int, default=1024)
    add("--window", type=int, default=1024)
    add("--batch-size", type=int, default=8)
    add("--validation-share", type=float, default=0.03)
    add("--steps", type=int, default=200)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
