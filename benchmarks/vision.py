# SPDX-License-Identifier: Apache-2.0
"""
What 2:4 and 4:8 cost an image classifier, by method, over seeds, from reloaded checkpoints.

    python benchmarks/vision.py MODEL --train CIFAR/train --test CIFAR/test

Each run loads the dense model, orders and prunes it with pictures of ``--train`` (labels
are not used), saves it, reads it back, and measures top-1 and the mean cosine of its
features to the dense model's on ``--test``.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nm_permute_plugin.evaluation.classification import (
    Seen,
    accuracy,
    labels_of,
    look,
    mean_cosine,
)
from nm_permute_plugin.evaluation.images import (
    image_files,
    image_processor,
    labelled_images,
    pixels,
)
from nm_permute_plugin.evaluation.loading import model_class
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import invert
from nm_permute_plugin.maths.scores import ScoreName
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import resolve
from nm_permute_plugin.training.calibration import split_images
from nm_permute_plugin.training.learn import LearnSettings
from nm_permute_plugin.training.objective import LossWeights
from nm_permute_plugin.training.orders import OrderShape
from nm_permute_plugin.training.pipeline import (
    Method,
    OrderSettings,
    permute_and_prune,
)

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
    images = _calibration(args)
    test = labelled_images(args.test)
    dense = _dense(test.files, args)
    if dense.logits is None:
        raise ValueError(f"{args.model} has no classifier: fine-tune it first")
    config = model_class(args.model).config_class.from_pretrained(args.model)
    labels = labels_of(test, list(config.id2label.values()))
    top1 = accuracy(dense.logits, labels, 1)
    print(f"{len(images)} pictures to calibrate; {len(labels)} test pictures")
    print(f"dense top-1 {top1:.2%}", flush=True)
    results = _resumed(args)
    done = {(r["pattern"], r["method"], r["seed"]) for r in results}
    for pattern in args.patterns:
        for method in args.methods:
            for seed in args.seeds if method in SEEDED else args.seeds[:1]:
                if (pattern, method, seed) in done:
                    continue
                result, seen = _run(method, pattern, seed, images, args)
                assert seen.logits is not None
                result["top1"] = accuracy(seen.logits, labels, 1)
                result["fidelity"] = mean_cosine(seen.features, dense.features)
                results.append(result)
                shown = {k: v for k, v in result.items() if k != "history"}
                print(json.dumps(shown), flush=True)
                # After every run: what was measured survives an interruption.
                record = {
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    "settings": _settings(args),
                    "dense": top1,
                    "results": results,
                }
                args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(_table(top1, results))


def _dense(files: Sequence[Path], args: argparse.Namespace) -> Seen:
    """What the dense model makes of the test pictures; kept beside the results."""
    kept = args.out.with_suffix(".pt")
    if args.resume and kept.exists():
        return Seen(**torch.load(kept))
    seen = look(args.model, files, args.device, args.batch_size)
    torch.save({"features": seen.features, "logits": seen.logits}, kept)
    return seen


def _settings(args: argparse.Namespace) -> dict[str, str]:
    """What one run depends on, beside its method, pattern and seed."""
    chosen = ("methods", "patterns", "seeds", "out", "resume")
    return {k: str(v) for k, v in vars(args).items() if k not in chosen}


def _resumed(args: argparse.Namespace) -> list[dict[str, object]]:
    """The results of an earlier call with the same settings, if asked for."""
    if not args.resume or not args.out.exists():
        return []
    record = json.loads(args.out.read_text())
    if record["settings"] != _settings(args):
        raise ValueError(f"{args.out} was measured with {record['settings']}")
    results: list[dict[str, object]] = record["results"]
    return results


def _calibration(args: argparse.Namespace) -> Tensor:
    """Pictures of the training folder in a fixed random order, so that classes mix."""
    files = image_files(args.train)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    chosen = [files[i] for i in order[: args.images].tolist()]
    return torch.cat(list(pixels(image_processor(args.model), chosen, args.batch_size)))


def _run(
    method: str, pattern: str, seed: int, images: Tensor, args: argparse.Namespace
) -> tuple[dict[str, object], Seen]:
    dtype = getattr(torch, args.dtype)
    model = model_class(args.model).from_pretrained(args.model, dtype=dtype)
    model = model.to(args.device).eval()
    prunable = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("classifier")
    ]
    parsed = NMPattern.parse(pattern)
    resolved = resolve(
        model, spec_of(model), parsed, prunable, head_dim_of(model.config)
    )
    score, how = METHODS[method]
    settings = OrderSettings(
        parsed,
        score=score,
        method=how,
        learn=LearnSettings(
            steps=args.steps,
            evaluate_every=args.evaluate_every,
            learning_rate=args.learning_rate,
            multiplier_rate=args.multiplier_rate,
            shape=OrderShape(
                row_limit=args.row_limit, multipliers=args.multiplier_rate > 0
            ),
            loss=LossWeights(
                divergence=args.divergence, cosine=args.cosine, hidden=args.hidden
            ),
            seed=seed,
        ),
    )
    samples = split_images(images, args.batch_size, args.held_back, seed)
    started = time.perf_counter()
    record = permute_and_prune(model, resolved, prunable, samples, settings)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        image_processor(args.model).save_pretrained(folder)
        del model
        files = labelled_images(args.test).files
        seen = look(folder, files, args.device, args.batch_size)
    if "residual" in record.perms:
        # The fold has put the channels of the features into this order.
        back = invert(record.perms["residual"])
        seen = replace(seen, features=seen.features[:, back])
    result: dict[str, object] = {
        "pattern": pattern,
        "method": method,
        "seed": seed,
        "seconds": seconds,
        "retained": record.retained[1],
        "history": record.history,
    }
    return result, seen


def _table(dense: float, results: Sequence[dict[str, object]]) -> str:
    lines = [
        "| pattern | method | seeds | top-1 | regained | spread | fidelity | seconds |",
        "|---|---|---|---|---|---|---|---|",
        f"| | dense | | {dense:.2%} | | | 1 | |",
    ]
    results = sorted(
        results, key=lambda r: (r["pattern"], list(METHODS).index(r["method"]))
    )
    base = {r["pattern"]: _float(r, "top1") for r in results if r["method"] == "wanda"}
    for pattern, method in dict.fromkeys((r["pattern"], r["method"]) for r in results):
        runs = [r for r in results if (r["pattern"], r["method"]) == (pattern, method)]
        found = [_float(r, "top1") for r in runs]
        regained = spread = ""
        if method in SEEDED and base.get(pattern, dense) < dense:
            shares = [(x - base[pattern]) / (dense - base[pattern]) for x in found]
            regained = f"{statistics.mean(shares):.1%}"
            spread = f"{min(shares):.1%} to {max(shares):.1%}"
        fidelity = statistics.mean(_float(r, "fidelity") for r in runs)
        seconds = statistics.mean(_float(r, "seconds") for r in runs)
        lines.append(
            f"| {pattern} | {method} | {len(runs)} | {statistics.mean(found):.2%} "
            f"| {regained} | {spread} | {fidelity:.4f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def _float(result: dict[str, object], key: str) -> float:
    return float(str(result[key]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the classifier")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--held-back", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--evaluate-every", type=int, default=20)
    parser.add_argument(
        "--row-limit", type=int, help="see LearnablePermutationModifier"
    )
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--multiplier-rate", type=float, default=0.03)
    parser.add_argument("--divergence", type=float, default=1.0)
    parser.add_argument("--cosine", type=float, default=0.0)
    parser.add_argument("--hidden", type=float, default=0.0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("vision.json"))
    parser.add_argument("--resume", action="store_true", help="add to what --out holds")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
