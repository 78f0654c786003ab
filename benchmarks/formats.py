# SPDX-License-Identifier: Apache-2.0
"""
What does each way of storing the same pruned weights cost, in perplexity and on disk?

    python benchmarks/formats.py MODEL --train brown.txt --test wikitext-2/test.txt

Prunes once with learned masks; every row of the table starts from those weights, is
written to files and read back from them by transformers, as it reads them by default:
compressed-tensors decompresses the weights at the first pass and goes on rounding the
activations as the scheme says. 8-bit rows are stored as sparse-24-bitmask.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from llmcompressor import oneshot, reset_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import nm_permute_plugin.modifiers  # noqa: F401  # GPTQ keeps zeros
from nm_permute_plugin.checkpoint.config import Format
from nm_permute_plugin.checkpoint.directory import open_checkpoint
from nm_permute_plugin.checkpoint.pattern import check_pattern
from nm_permute_plugin.checkpoint.plan import TWO_FOUR, choose_format
from nm_permute_plugin.checkpoint.record import read_promise
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.cli.prune import prune_checkpoint
from nm_permute_plugin.evaluation.perplexity import perplexity
from nm_permute_plugin.evaluation.pretrained import load_checkpoint
from nm_permute_plugin.pruning.settings import Settings
from texts import text_rows, text_windows

DENSE: Format = "dense"
SPARSE: Format = "sparse-24-bitmask"
SMOOTH, GPTQ = "_SMOOTHQUANT", "_GPTQ"
SCHEMES = ["FP8_DYNAMIC", "FP8", "W8A8", "W4A16"]
SCHEMES = [x + how for x in SCHEMES for how in ("", GPTQ)] + [f"W8A8{SMOOTH}"]


def main() -> None:
    """Run what the command line asks for."""
    args = _arguments()
    out = args.out or Path(tempfile.mkdtemp(prefix="nm-permute-formats-"))
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        row.tolist()
        for row in text_rows(args.model, args.train, args.rows, args.sequence_length)
    ]
    test = text_windows(args.model, args.test, args.window, False, args.windows)
    if not (out / DENSE / "config.json").exists():
        recipe = out / f"{DENSE}.yaml"
        recipe.write_text(yaml.safe_dump({"prune_stage": _learned(args)}))
        minutes = prune_checkpoint(args.model, recipe, out / DENSE, rows, args.device)
        print(f"learned, folded and pruned in {minutes:.1f} minutes", flush=True)
    if not (out / SPARSE / "config.json").exists():
        convert(out / DENSE, out / SPARSE, SPARSE)
    for scheme in SCHEMES:
        if not (out / scheme / "config.json").exists():
            _quantize(out / DENSE, out / scheme, scheme, args, rows)

    print(f"files in {out}; {len(rows)} rows of {args.sequence_length} tokens to learn")
    print(f"tested on {len(test)} windows of {args.window} tokens, {args.device}")
    print("| stored | perplexity | MB on disk | verify |\n|---|---|---|---|")
    logits: dict[str, Tensor] = {}
    folders = {"not pruned": Path(args.model)}
    folders |= {name: out / name for name in (DENSE, SPARSE, *SCHEMES)}
    for name, folder in folders.items():
        model = load_checkpoint(folder, args.device)
        if name in (DENSE, SPARSE):
            with torch.no_grad():
                window = test[0][None].to(args.device)
                logits[name] = model(window, use_cache=False).logits
        value = perplexity(model, test)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6
        promised = None if name == "not pruned" else _pruned(out / DENSE)
        good = "good" if verify(folder, promised).good else "FAULTS"
        print(f"| {name} | {value:.2f} | {size:.1f} | {good} |", flush=True)
    if not torch.equal(logits[DENSE], logits[SPARSE]):
        raise SystemExit("dense and sparse-24-bitmask give different logits")
    print("logits of dense and sparse-24-bitmask agree bit by bit, first window")


def _learned(args: argparse.Namespace) -> dict[str, object]:
    """The stage of the recipe that prunes."""
    settings = Settings.model_validate(
        {
            "format": DENSE,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "learn": {
                "steps": args.steps,
                "multipliers": {"rate": args.multiplier_rate},
            },
            "validation": {"share": args.validation_share},
        }
    )
    fields = settings.model_dump(mode="json", exclude_unset=True)
    return {"permutation_modifiers": {"LearnablePermutationModifier": fields}}


def _quantize(
    source: Path,
    target: Path,
    scheme: str,
    args: argparse.Namespace,
    rows: list[list[int]],
) -> None:
    """Quantize pruned weights, check that they still are, store 8 bits sparse."""
    fields: dict[str, object] = {"targets": ["Linear"], "ignore": ["lm_head"]}
    name = scheme.removesuffix(SMOOTH).removesuffix(GPTQ)
    if name == "W4A16":
        weights = {"num_bits": 4, "strategy": "group", "group_size": args.group_size}
        group = {"targets": ["Linear"], "weights": weights}
        fields = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    else:
        fields["scheme"] = name
    kind = GPTQModifier if scheme.endswith(GPTQ) else QuantizationModifier
    recipe: list[Modifier] = [kind(**fields)]
    if scheme.endswith(SMOOTH):
        recipe.insert(0, SmoothQuantModifier(ignore=["lm_head"]))
    reset_session()
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(source, dtype="auto"),
        tokenizer=AutoTokenizer.from_pretrained(source),
        recipe=recipe,
        dataset=Dataset.from_dict({"input_ids": rows}),
        max_seq_length=args.sequence_length,
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        output_dir=str(target),
    )
    pruned = _pruned(source)
    checkpoint = open_checkpoint(target)
    check_pattern(checkpoint, pruned, TWO_FOUR)
    form, _ = choose_format(checkpoint, "auto", TWO_FOUR, pruned)
    if form != DENSE:
        convert(target, target, form, modules=pruned)


def _pruned(checkpoint: Path) -> list[str]:
    """The modules that the run behind a checkpoint pruned."""
    promise = read_promise(checkpoint)
    if promise is None:
        raise ValueError(f"{checkpoint} has no record of a run")
    return promise.modules


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
    parser.add_argument("--multiplier-rate", type=float, default=0.03)
    parser.add_argument("--validation-share", type=float, default=0.06)
    parser.add_argument("--group-size", type=int, default=64, help="of W4A16")
    parser.add_argument("--seed", type=int, default=0)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
