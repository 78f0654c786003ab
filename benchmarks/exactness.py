# SPDX-License-Identifier: Apache-2.0
"""
How far random orders of all spaces move a model's outputs, and whether they come undone.

    python benchmarks/exactness.py shapes            # ViT-B/16, ViT-L/14, LLaMA-3.2-1B
    python benchmarks/exactness.py classes           # a tiny model of every class

Weights are random, constant ones too. Differences are relative: the largest by the largest
output, and the norm by the outputs' norm. In float64 nothing but the spec can be wrong; in
shorter formats the rest is the format's own rounding, beside which stands how far the
model is from itself in float32 (LLaMA) or float64 (ViT).
"""

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.exactness import (
    fold_checked,
    outputs_of,
    random_batch,
    random_perms,
    to_float64,
    vary_constants,
)
from nm_permute_plugin.specs.fold import fold, invert_all
from nm_permute_plugin.specs.spec import resolve

VIT_B16 = {"image_size": 224, "patch_size": 16, "num_labels": 1000}
VIT_L14 = {
    "num_labels": 1000,
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SHAPES = [
    ("ViT-B/16", "ViTForImageClassification", "ViTConfig", VIT_B16, torch.float64),
    ("ViT-B/16", "ViTForImageClassification", "ViTConfig", VIT_B16, torch.float32),
    ("ViT-L/14", "ViTForImageClassification", "ViTConfig", VIT_L14, torch.float64),
    ("ViT-L/14", "ViTForImageClassification", "ViTConfig", VIT_L14, torch.float32),
    ("LLaMA-3.2-1B", "LlamaForCausalLM", "LlamaConfig", LLAMA_1B, torch.bfloat16),
]


def measure(model: nn.Module, seed: int) -> str:
    """The cells of a row: spaces, both differences, whether the fold is undone."""
    resolved = resolve(
        model, spec_of(model), NMPattern(2, 4), [], head_dim_of(model.config)
    )
    families: dict[str, int] = {}
    for space in resolved.spaces.values():
        families[space.family] = families.get(space.family, 0) + 1
    perms, batch = random_perms(resolved, seed), random_batch(model, seed)
    before, stored = outputs_of(model, batch), fingerprint(model)
    norm = fold_checked(
        model, resolved, perms, lambda: outputs_of(model, batch), math.inf
    )
    after = outputs_of(model, batch)
    fold(model, resolved, invert_all(perms))
    undone = "yes" if fingerprint(model) == stored else "NO"
    spaces = ", ".join(f"{count} {family}" for family, count in families.items())
    return f"{spaces} | {undone} | {largest(after, before):.1e} | {norm:.1e}"


def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two outputs, by the largest value of the second."""
    return max(
        float((one[name] - tensor).abs().max() / tensor.abs().max())
        for name, tensor in other.items()
    )


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest of the outputs' distances, by norm."""
    return max(
        float((one[name].double() - tensor.double()).norm() / tensor.double().norm())
        for name, tensor in other.items()
    )


def fingerprint(model: nn.Module) -> str:
    """Of every bit of every parameter and buffer."""
    digest = hashlib.blake2b()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def rounding(model: nn.Module, seed: int) -> str:
    """How far the model is from itself with twice the bits; it is widened for good."""
    dtype = next(model.parameters()).dtype
    if dtype == torch.float64:
        return ""
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    batch = random_batch(model, seed)
    short = outputs_of(model, batch)
    model.to(wide)
    batch = {
        name: tensor.to(wide) if tensor.is_floating_point() else tensor
        for name, tensor in batch.items()
    }
    return f"{distance(short, outputs_of(model, batch)):.1e}"


def shapes(seed: int, only: str) -> None:
    print(
        "| model | dtype | parameters | spaces | unfold bitwise | largest difference "
        "| difference by norm | the dtype's own rounding | seconds |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for label, kind, config, options, dtype in SHAPES:
        if only not in label:
            continue
        started = time.perf_counter()
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        model = getattr(transformers, kind)(getattr(transformers, config)(**options))
        torch.set_default_dtype(torch.float32)
        model.eval()
        vary_constants(model, seed)
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        cells = measure(model, seed)
        row = [label, str(dtype).removeprefix("torch."), f"{count:.0f} M", cells]
        row += [rounding(model, seed), f"{time.perf_counter() - started:.0f}"]
        print(f"| {' | '.join(row)} |", flush=True)


def classes(seed: int, only: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "specs"))
    from zoo import ZOO, tiny

    print(
        "| class | shape | spaces | unfold bitwise | largest difference "
        "| difference by norm |\n|---|---|---|---|---|---|"
    )
    for case in ZOO:
        name, config, options = case.values
        if only in name:
            model = to_float64(tiny(name, config, options, torch.float64))
            print(f"| {name} | {case.id} | {measure(model, seed)} |", flush=True)


def main() -> None:
    what: dict[str, Callable[[int, str], None]] = {"shapes": shapes, "classes": classes}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=what)
    parser.add_argument("--only", default="", help="part of a model's name")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    what[args.what](args.seed, args.only)


if __name__ == "__main__":
    main()
