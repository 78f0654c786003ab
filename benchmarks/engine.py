# SPDX-License-Identifier: Apache-2.0
"""
Prefill and decode of a 2:4 model in vLLM, sparse kernels beside dense ones.

    python benchmarks/engine.py OUT --shape llama-3-8b --layers 32 --dtypes bf16 fp8 int8

The weights are random and 2:4, made here, zeros stored: no download, and the time of a
step does not depend on their values. Each dtype is served twice, by ``bench-serve``.
Needs the environment that serves (``pip install ".[vllm]"``).
"""

import argparse
import json
import shutil
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

from nm_permute_plugin.checkpoint.config import SparsityConfig
from nm_permute_plugin.cli.bench_serve import time_both_sides
from nm_permute_plugin.serving.bench import Workload, engine_arguments

SHAPES = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 256,
    },
}
EIGHT_BITS = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}


def main() -> None:
    args = _arguments()
    workload = Workload(
        batches=tuple(args.batches),
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        repeats=args.repeats,
        eager=args.eager,
        engine=engine_arguments(args.engine),
    )
    for kind in args.dtypes:
        checkpoint = args.out / f"{args.shape}-{kind}"
        made = (checkpoint, args.shape, args.layers, kind, args.device)
        with get_context("spawn").Pool(1) as pool:  # whose GPU memory ends with it
            pool.apply(write_checkpoint, made)
        table = time_both_sides(checkpoint, workload, args.out / f"serve-{kind}")
        print(f"{args.shape}, {args.layers} layers, {kind}\n{table}", flush=True)
        shutil.rmtree(checkpoint)


def write_checkpoint(
    folder: Path, shape: str, layers: int, kind: str, device: str
) -> None:
    """A Llama model with random 2:4 linears; one file a layer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "num_hidden_layers": layers,
        **SHAPES[shape],
    }
    folder.mkdir(parents=True, exist_ok=True)
    width, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    generator = torch.Generator(device).manual_seed(0)
    files: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor], name: str) -> None:
        save_file(
            {k: v.contiguous().cpu() for k, v in tensors.items()},
            folder / name,
            {"format": "pt"},
        )
        files.update(dict.fromkeys(tensors, name))

    linears = []
    for index in range(layers):
        prefix = f"model.layers.{index}"
        tensors = {
            f"{prefix}.{norm}.weight": torch.ones(width, dtype=torch.bfloat16)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for name, rows, channels in _linears(config):
            name = f"{prefix}.{name}"
            linears.append(name)
            weight = _sparse(rows, channels, generator)
            tensors |= _stored(name, weight, kind)
        save(tensors, f"layer-{index:03}.safetensors")
    table = torch.randn(vocabulary, width, generator=generator, device=device)
    outer = {
        "model.embed_tokens.weight": table.bfloat16(),
        "lm_head.weight": (table / width**0.5).bfloat16(),
        "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
    }
    save(outer, "outer.safetensors")
    index_of = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_of))
    sparsity = SparsityConfig(format="dense", targets=tuple(linears))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": sparsity.to_json(),
        **_quantization(kind),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _linears(config: dict[str, object]) -> list[tuple[str, int, int]]:
    """Name, rows and channels of the linears of a layer."""
    width, inner = (
        int(str(config["hidden_size"])),
        int(str(config["intermediate_size"])),
    )
    head = int(str(config["head_dim"]))
    queries = head * int(str(config["num_attention_heads"]))
    keys = head * int(str(config["num_key_value_heads"]))
    return [
        ("self_attn.q_proj", queries, width),
        ("self_attn.k_proj", keys, width),
        ("self_attn.v_proj", keys, width),
        ("self_attn.o_proj", width, queries),
        ("mlp.gate_proj", inner, width),
        ("mlp.up_proj", inner, width),
        ("mlp.down_proj", width, inner),
    ]


def _sparse(rows: int, channels: int, generator: torch.Generator) -> torch.Tensor:
    device = generator.device
    shape = (rows, channels // 4, 4)
    places = torch.rand(shape, generator=generator, device=device).argsort(-1)
    weight = torch.randn(shape, generator=generator, device=device)
    return weight.masked_fill(places < 2, 0).view(rows, channels) / channels**0.5


def _stored(name: str, weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of one linear as compressed-tensors names them."""
    if kind == "bf16":
        return {f"{name}.weight": weight.bfloat16()}
    dtype, largest = EIGHT_BITS[kind]
    scale = weight.abs().amax(1, keepdim=True) / largest
    values = weight / scale
    rounded = values.round() if kind == "int8" else values
    # No negative zeros: a float8 zero is told by its bits.
    rounded = rounded.to(dtype).float()
    stored = rounded.masked_fill(rounded == 0, 0).to(dtype)
    return {f"{name}.weight": stored, f"{name}.weight_scale": scale.bfloat16()}


def _quantization(kind: str) -> dict[str, object]:
    """Weights by output channel, activations by token, as compressed-tensors writes it."""
    if kind == "bf16":
        return {"format": "dense"}
    form = {
        "num_bits": 8,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": True,
    }
    group = {
        "targets": ["Linear"],
        "weights": {**form, "strategy": "channel", "dynamic": False},
        "input_activations": {**form, "strategy": "token", "dynamic": True},
    }
    return {
        "format": "float-quantized" if kind == "fp8" else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a folder for checkpoints and figures")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=32)
    kinds = ["bf16", *EIGHT_BITS]
    parser.add_argument("--dtypes", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="the median is taken")
    parser.add_argument("--eager", action="store_true", help="without compiled graphs")
    parser.add_argument(
        "--engine", default="{}", help="further arguments of vllm.LLM, as JSON"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where weights are made")
    return parser.parse_args()


if __name__ == "__main__":
    main()
