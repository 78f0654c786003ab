# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints as llm-compressor leaves them, and how to compare tensors."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from nm_permute_plugin.checkpoint.finish import Finish
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.checkpoint.model_card import Card
from nm_permute_plugin.checkpoint.plan import TWO_FOUR

KINDS = ["bf16", "fp16", "fp8", "int8"]
Tensors = dict[str, Tensor]
MakeDense = Callable[..., Path]


def linears(model: PreTrainedModel) -> list[str]:
    """The names of a tiny model's linears, the head aside."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def finish_of(model: PreTrainedModel, asked: str = "auto") -> Finish:
    """What is done with each checkpoint of a run that pruned all these linears."""
    pruned = linears(model)
    card = Card("folder", TWO_FOUR, pruned, 1e-7, (0.5, 0.6), [], {"torch": "2"})
    report = {"pruned": pruned, "modifier": {"mask_structure": "2:4"}}
    perms = {"residual": torch.arange(32)}
    return Finish(asked, card, perms, report)


def quantize(path: Path, kind: str) -> None:
    """Turn the linears of a checkpoint into 8 bits, as llm-compressor stores them."""
    from compressed_tensors.quantization import (
        QuantizationConfig,
        preset_name_to_scheme,
    )

    fp8 = kind == "fp8"
    largest, dtype = (448.0, torch.float8_e4m3fn) if fp8 else (127.0, torch.int8)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if "_proj.weight" in n]:
            weight = tensors[name].float()
            scale = (weight.abs().amax(1, keepdim=True) / largest).to(torch.bfloat16)
            values = (weight / scale.float()).clamp(-largest, largest)
            tensors[name] = (values if fp8 else values.round()).to(dtype)
            tensors[f"{name}_scale"] = scale
        save_file(tensors, file, {"format": "pt"})
    index = path / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {
            name: file.name
            for file in path.glob("*.safetensors")
            for name in load_file(file)
        }
        index.write_text(json.dumps(content))
    scheme = preset_name_to_scheme(
        "FP8_DYNAMIC" if kind == "fp8" else "W8A8", ["Linear"]
    )
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format="float-quantized" if fp8 else "int-quantized",
        quantization_status="compressed",
    )
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "version": "0.19.0",
        **quantization.model_dump(mode="json"),
        "sparsity_config": {},
        "transform_config": {},
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))


def tensors_of(path: Path) -> Tensors:
    """Every tensor of a checkpoint directory, by the safetensors package."""
    return {
        k: v
        for f in sorted(path.glob("*.safetensors"))
        for k, v in load_file(f).items()
    }


def random_bits(
    rows: int, columns: int, dtype: torch.dtype, seed: int, kept: int = 2
) -> Tensor:
    """Any bit patterns at all, NaN and -0.0 among them, at most ``kept`` of four."""
    generator = torch.Generator().manual_seed(seed)
    width = dtype.itemsize
    raw = torch.randint(
        256, (rows * columns * width,), generator=generator, dtype=torch.uint8
    )
    words = raw.view(WORDS[dtype]).view(rows, columns)
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    return words.masked_fill((order >= kept).view(rows, columns), 0).view(dtype)


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    """Two tensors agree in dtype, shape and every bit."""
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    words = WORDS.get(left.dtype, left.dtype)
    assert torch.equal(left.contiguous().view(words), right.contiguous().view(words))


def assert_same_tensors(left: Tensors, right: Tensors) -> None:
    """Two sets of tensors agree in names and bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert_same_bits(tensor, right[name])
