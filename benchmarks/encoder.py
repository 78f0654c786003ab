# SPDX-License-Identifier: Apache-2.0
"""
How near a pruned text encoder's embeddings stay to the dense model's, by method.

    python benchmarks/encoder.py MODEL --train brown.txt --test wikitext-2/test.txt

MODEL has no head (BertModel, MiniLM for example). Each run loads it, orders and prunes it,
saves it, reads it back, and measures the mean cosine between its embeddings of test rows
(the mean of the final hidden states, unit length) and the dense model's.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from nm_permute_plugin.evaluation.classification import mean_cosine
from nm_permute_plugin.evaluation.loading import model_class
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.scores import ScoreName
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import resolve
from nm_permute_plugin.training.learn import LearnSettings
from nm_permute_plugin.training.orders import OrderShape
from nm_permute_plugin.training.pipeline import (
    Method,
    OrderSettings,
    permute_and_prune,
)
from nm_permute_plugin.training.text import rows_of, split_text

METHODS: dict[str, tuple[ScoreName, Method]] = {
    "magnitude": ("magnitude", "identity"),
    "wanda": ("wanda", "identity"),
    "ria": ("ria", "identity"),
    "search": ("wanda", "search"),
    "learned": ("wanda", "learned"),
}
SEEDED = ("search", "learned")


def main() -> None:
    args = _arguments()
    train = _rows(args.train, args.rows, args)
    test = _rows(args.test, args.test_rows, args)
    dense = _embeddings(args.model, test, args)
    print(f"{len(train)} training rows, {len(test)} test rows of {args.tokens} tokens")
    results: list[dict[str, object]] = []
    for pattern in args.patterns:
        for method in args.methods:
            for seed in args.seeds if method in SEEDED else args.seeds[:1]:
                started = time.perf_counter()
                embeddings, retained = _run(method, pattern, seed, train, test, args)
                result: dict[str, object] = {
                    "pattern": pattern,
                    "method": method,
                    "seed": seed,
                    "seconds": time.perf_counter() - started,
                    "retained": retained,
                    "fidelity": mean_cosine(embeddings, dense),
                }
                results.append(result)
                print(json.dumps(result), flush=True)
                settings = {k: str(v) for k, v in vars(args).items()}
                record = {"settings": settings, "results": results}
                args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(_table(results))


def _rows(files: Sequence[Path], count: int, args: argparse.Namespace) -> Tensor:
    """Rows of the text in a fixed random order, each with the tokenizer's special ends."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = "\n\n".join(file.read_text() for file in files)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    body = args.tokens - 2
    rows = torch.tensor(ids[: len(ids) // body * body]).view(-1, body)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([[tokenizer.cls_token_id, tokenizer.sep_token_id]])
    ends = ends.expand(len(rows), 2)
    return torch.cat([ends[:, :1], rows, ends[:, 1:]], dim=1)[order[:count]]


def _run(
    method: str,
    pattern: str,
    seed: int,
    train: Tensor,
    test: Tensor,
    args: argparse.Namespace,
) -> tuple[Tensor, float]:
    dtype = getattr(torch, args.dtype)
    model = model_class(args.model).from_pretrained(args.model, dtype=dtype)
    model = model.to(args.device).eval()
    prunable = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "pooler" not in name
    ]
    parsed = NMPattern.parse(pattern)
    heads = head_dim_of(model.config)
    resolved = resolve(model, spec_of(model), parsed, prunable, heads)
    score, how = METHODS[method]
    learn = LearnSettings(
        steps=args.steps,
        evaluate_every=args.evaluate_every,
        learning_rate=args.learning_rate,
        shape=OrderShape(multipliers=True, row_limit=args.row_limit),
        seed=seed,
    )
    vocabulary = model.get_input_embeddings().num_embeddings
    rows = rows_of([{"input_ids": train}], vocabulary)
    record = permute_and_prune(
        model,
        resolved,
        prunable,
        split_text(rows, args.batch_size, args.held_back, seed),
        OrderSettings(parsed, score=score, method=how, learn=learn),
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        return _embeddings(folder, test, args), record.retained[1]


def _embeddings(folder: str | Path, rows: Tensor, args: argparse.Namespace) -> Tensor:
    model = model_class(folder).from_pretrained(folder, dtype="auto")
    model = model.to(args.device).eval()
    found = []
    with torch.no_grad():
        for batch in rows.split(args.batch_size):
            hidden = model(input_ids=batch.to(args.device)).last_hidden_state
            found.append(F.normalize(hidden.float().mean(1), dim=-1).cpu())
    return torch.cat(found)


def _table(results: Sequence[dict[str, object]]) -> str:
    lines = [
        "| pattern | method | seeds | cosine | regained | spread | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    base = {
        r["pattern"]: _float(r, "fidelity") for r in results if r["method"] == "wanda"
    }
    for pattern, method in dict.fromkeys((r["pattern"], r["method"]) for r in results):
        runs = [r for r in results if (r["pattern"], r["method"]) == (pattern, method)]
        found = [_float(r, "fidelity") for r in runs]
        regained = spread = ""
        if method in SEEDED and pattern in base:
            shares = [(x - base[pattern]) / (1 - base[pattern]) for x in found]
            regained = f"{statistics.mean(shares):.1%}"
            spread = f"{min(shares):.1%} to {max(shares):.1%}"
        seconds = statistics.mean(_float(r, "seconds") for r in runs)
        lines.append(
            f"| {pattern} | {method} | {len(runs)} | {statistics.mean(found):.4f} "
            f"| {regained} | {spread} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def _float(result: dict[str, object], key: str) -> float:
    return float(str(result[key]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the encoder")
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--test-rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--held-back", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--evaluate-every", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument(
        "--row-limit", type=int, help="see LearnablePermutationModifier"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("encoder.json"))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
