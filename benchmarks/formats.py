# SPDX-License-Identifier: Apache-2.0
"""
What does each way of storing the same pruned weights cost, in perplexity and on disk?

    python benchmarks/formats.py MODEL --train brown.txt --test wikitext-2/test.txt

Prunes once with a learned order; every row of the table starts from those weights, is
written to files and read back from them by transformers. Quantized rows are read with
``dequantize=False``: weights as they are stored, activations quantized as they pass.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import yaml
from torch import Tensor

from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.cli.prune import prune_checkpoint
from nm_permute_plugin.evaluation.perplexity import (
    load_checkpoint,
    perplexity,
    tokenize,
)

DENSE, SPARSE = "dense", "sparse-24-bitmask"
SCHEMES = ["FP8_DYNAMIC", "FP8", "W8A8", "W4A16"]


def main() -> None:
    """Run what the command line asks for."""
    args = _arguments()
    out = args.out or Path(tempfile.mkdtemp(prefix="nm-permute-formats-"))
    out.mkdir(parents=True, exist_ok=True)
    rows = _rows(args)
    test = tokenize(args.model, "\n\n".join(f.read_text() for f in args.test))
    test = test[: args.windows * args.window]
    _make(out, args.model, DENSE, _learned(args), rows, args.device)
    if not (out / SPARSE / "config.json").exists():
        convert(out / DENSE, out / SPARSE, SPARSE)
    for scheme in SCHEMES:
        recipe = _quantized(scheme, args.group_size)
        _make(out, out / DENSE, scheme, recipe, rows, args.device)

    print(f"files in {out}; {len(rows)} rows of {args.sequence_length} tokens to learn")
    print(f"tested on {len(test)} tokens in windows of {args.window}, {args.device}")
    print("| stored | perplexity | MB on disk | verify |\n|---|---|---|---|")
    logits: dict[str, Tensor] = {}
    folders = {"not pruned": Path(args.model)}
    folders |= {name: out / name for name in (DENSE, SPARSE, *SCHEMES)}
    for name, folder in folders.items():
        model = load_checkpoint(folder, args.device)
        if name in (DENSE, SPARSE):
            with torch.no_grad():
                window = test[None, : args.window].to(args.device)
                logits[name] = model(window, use_cache=False).logits
        value = perplexity(model, test, args.window)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6
        good = "good" if verify(folder).good else "FAULTS"
        print(f"| {name} | {value:.2f} | {size:.1f} | {good} |", flush=True)
    if not torch.equal(logits[DENSE], logits[SPARSE]):
        raise SystemExit("dense and sparse-24-bitmask give different logits")
    print("logits of dense and sparse-24-bitmask agree bit by bit, first window")


def _make(
    out: Path,
    source: Path,
    name: str,
    recipe: dict[str, object],
    rows: list[list[int]],
    device: str,
) -> None:
    """Run a recipe into a folder of its own, unless an earlier run has done so."""
    if (out / name / "config.json").exists():
        return
    file = out / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"prune_stage": recipe}))
    minutes = prune_checkpoint(source, file, out / name, rows, device)
    print(f"{name}: {minutes:.1f} minutes", flush=True)


def _learned(args: argparse.Namespace) -> dict[str, object]:
    fields = {
        "method": "learned",
        "format": "dense",
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "row_limit": args.row_limit,
        "held_back": args.held_back,
        "seed": args.seed,
    }
    return {"permutation_modifiers": {"LearnablePermutationModifier": fields}}


def _quantized(scheme: str, group_size: int) -> dict[str, object]:
    """Quantize pruned weights: magnitude in the order as it is keeps what is not 0."""
    fields: dict[str, object] = {"targets": ["Linear"], "ignore": ["lm_head"]}
    if scheme == "W4A16":
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": group_size,
        }
        group = {"targets": ["Linear"], "weights": weights}
        fields = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    else:
        fields["scheme"] = scheme
    same = {"method": "identity", "score": "magnitude"}
    return {
        "permutation_modifiers": {"LearnablePermutationModifier": same},
        "quantization_modifiers": {"QuantizationModifier": fields},
    }


def _rows(args: argparse.Namespace) -> list[list[int]]:
    """Rows of the training text in a fixed random order, so that all files mix."""
    tokens = tokenize(args.model, "\n\n".join(f.read_text() for f in args.train))
    count = len(tokens) // args.sequence_length
    rows = tokens[: count * args.sequence_length].view(count, -1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    chosen: list[list[int]] = rows[order[: args.rows]].tolist()
    return chosen


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, help="keeps the checkpoints, reuses them")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--row-limit", type=int, default=8192)
    parser.add_argument("--held-back", type=float, default=0.06)
    parser.add_argument("--group-size", type=int, default=64, help="of W4A16")
    parser.add_argument("--seed", type=int, default=0)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
