# SPDX-License-Identifier: Apache-2.0
"""
``generate`` of transformers with a 2:4 model: ``nmp.accelerate`` beside the dense linears.

    python benchmarks/generation.py OUT.json

The model has LLaMA-3.2-1B's shape and random 2:4 weights, made here in bfloat16. Each
batch is generated compiled (a static cache, which transformers compiles by itself) and
eagerly, dense and sparse one after the other: ``accelerate`` and ``undo`` in between. The
first ``accelerate`` measures the kernels. OUT.json is written anew after every cell.
"""

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import nm_permute_plugin as nmp
from shapes import SHAPES

TINY: dict[str, int | bool] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Measure every cell that there is time for, and print a table."""
    args = _arguments()
    started = time.perf_counter()
    found: dict[str, object] = {**_environment(args), "cells": []}
    model = make_model(args.shape, args.layers, args.device)
    before = digest(model)
    with _told(found, "accelerate"):
        found["accelerate"] = first_accelerate(model, args)
    _write(args.out, found)
    for batch in args.batches:
        for way in args.ways:
            cell: dict[str, object] = {"way": way, "batch": batch}
            found["cells"].append(cell)
            if time.perf_counter() - started > args.seconds:
                cell["error"] = f"not begun: more than {args.seconds} s had passed"
            else:
                with _told(cell, f"{way}, batch {batch}"):
                    measure(model, cell, args)
            cell["at"] = time.perf_counter() - started
            _write(args.out, found)
            print(line(cell), flush=True)
    nmp.accelerate(model, undo=True)
    found["undone_bitwise"] = digest(model) == before
    found["seconds"] = time.perf_counter() - started
    _write(args.out, found)
    print(f"undone bitwise: {found['undone_bitwise']}, {found['seconds']:.0f} s in all")


def make_model(shape: str, layers: int | None, device: str) -> LlamaForCausalLM:
    """A random Llama model in bfloat16 whose linears are 2:4, all but the head."""
    size = dict(SHAPES.get(shape, TINY))
    if layers is not None:
        size["num_hidden_layers"] = layers
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=4096))
    finally:
        torch.set_default_dtype(default)
    for linear in model.model.layers.modules():
        if isinstance(linear, nn.Linear):
            weight = linear.weight.data
            order = torch.rand_like(weight, dtype=torch.float32)
            places = order.view(len(weight), -1, 4).argsort(-1).view(weight.shape)
            weight.normal_(std=weight.shape[1] ** -0.5).masked_fill_(places < 2, 0)
    return model.eval()


def first_accelerate(
    model: LlamaForCausalLM, args: argparse.Namespace
) -> dict[str, object]:
    """Time and memory of it, how far its logits are off, and the kernels chosen."""
    from nm_permute_plugin.serving.ops import TABLES

    ids = prompt(model, 2, args)
    with torch.no_grad():
        dense = model(ids).logits.float()
    memory = allocated()
    begin = now()
    nmp.accelerate(model)
    seconds = now() - begin
    after = allocated()
    with torch.no_grad():
        wrong = (model(ids).logits.float() - dense).abs().max() / dense.abs().max()
    again = now()
    nmp.accelerate(model, undo=True)
    undo = now() - again
    again = now()
    nmp.accelerate(model)
    return {
        "seconds": seconds,
        "again_seconds": now() - again,
        "undo_seconds": undo,
        "bytes_dense": memory,
        "bytes_accelerated": after,
        "logits_off_by_share": float(wrong),
        "linears": sum(hasattr(m, "is_accelerated") for m in model.modules()),
        "kernels": {
            name: {bucket.tokens: bucket.chosen.kernel for bucket in table.buckets}
            for name, table in TABLES.items()
        },
        "microseconds": {name: table.as_text() for name, table in TABLES.items()},
    }


def measure(
    model: LlamaForCausalLM, cell: dict[str, object], args: argparse.Namespace
) -> None:
    """Dense, then sparse, in the same process; fills in the cell."""
    ids = prompt(model, int(str(cell["batch"])), args)
    said = {}
    for side in ("dense", "sparse"):
        nmp.accelerate(model, undo=side == "dense")
        cell[side], said[side] = timed(model, ids, str(cell["way"]), args)
    dense, sparse = cell["dense"], cell["sparse"]
    assert isinstance(dense, dict)
    assert isinstance(sparse, dict)
    cell["ratios"] = {
        name: dense[name] / sparse[name]
        for name in dense
        if dense[name] and sparse[name]
    }
    cell["same_tokens"] = float((said["dense"] == said["sparse"]).float().mean())


def timed(
    model: LlamaForCausalLM, ids: Tensor, way: str, args: argparse.Namespace
) -> tuple[dict[str, float], Tensor]:
    """Seconds of a prefill and of a decode step, and what was said."""
    compiled = way == "compiled"
    torch.compiler.reset()
    model.__dict__.pop("_compiled_call", None)
    fixed = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if compiled:
        longest = args.prompt + args.tokens + 8
        fixed |= {"cache_implementation": "static", "max_cache_len": longest}

    def run(tokens: int) -> Tensor:
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **fixed)

    def seconds(tokens: int, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            begin = now()
            run(tokens)
            times.append(now() - begin)
        return statistics.median(times)

    begin = now()
    said = run(args.tokens if compiled else 8)
    first = now() - begin
    prefill = seconds(1, 5)
    repeats = args.repeats if compiled else 1
    whole = seconds(args.tokens, repeats)
    step = (whole - prefill) / (args.tokens - 1)
    gpu = gpu_step(run, args) if compiled else 0.0
    print(
        f"  {way}, batch {len(ids)}: first {first:.1f} s, prefill {1000 * prefill:.1f} ms, "
        f"step {1000 * step:.3f} ms, of it on the GPU {1000 * gpu:.3f} ms",
        flush=True,
    )
    return {"whole": whole, "prefill": prefill, "step": step, "gpu_step": gpu}, said


def gpu_step(run: Callable[[int], Tensor], args: argparse.Namespace) -> float:
    """Seconds that the GPU works in a decode step; 0 where that cannot be told."""
    if not torch.cuda.is_available():
        return 0.0
    try:
        few = (2, 18)
        busy = []
        for tokens in few:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            ) as profile:
                run(tokens)
                torch.cuda.synchronize()
            events = profile.key_averages()
            busy.append(sum(event.self_device_time_total for event in events) / 1e6)
        return (busy[1] - busy[0]) / (few[1] - few[0])
    except Exception:
        traceback.print_exc()
        return 0.0


def prompt(model: LlamaForCausalLM, batch: int, args: argparse.Namespace) -> Tensor:
    """Random tokens [batch, prompt], the same for each side."""
    generator = torch.Generator().manual_seed(batch)
    size = (batch, args.prompt)
    ids = torch.randint(3, model.config.vocab_size, size, generator=generator)
    return ids.to(model.device)


def digest(model: nn.Module) -> list[int]:
    """A sum of the bits of each weight, weighted by their places."""
    sums = []
    for _, weight in sorted(model.state_dict().items()):
        bits = weight.detach().view(torch.int16).flatten().long()
        places = torch.arange(len(bits), device=bits.device) % 65521 + 1
        sums.append(int((bits * places).sum()))
    return sums


def line(cell: dict[str, object]) -> str:
    """A line of the table."""
    name = f"{cell['way']}, batch {cell['batch']}"
    ratios = cell.get("ratios")
    if not isinstance(ratios, dict):
        return f"{name}: {cell.get('error')}"
    shown = ", ".join(f"{key} {value:.2f}" for key, value in ratios.items())
    same = f"{cell['same_tokens']:.0%} of tokens the same"
    return f"{name}: dense over sparse seconds: {shown}; {same}"


@contextmanager
def _told(record: dict[str, object], what: str) -> Iterator[None]:
    """Write a failure down and go on: what was measured before is worth keeping."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        record["error"] = f"{what}: {type(error).__name__}: {str(error)[:2000]}"


def _environment(args: argparse.Namespace) -> dict[str, object]:
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    given = {key: str(value) for key, value in vars(args).items()}
    return {"device": device, "versions": versions, "arguments": given}


def _write(path: Path, found: dict[str, object]) -> None:
    path.write_text(json.dumps(found, indent=1, default=str) + "\n")


def allocated() -> int:
    """Bytes of tensors on the GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def now() -> float:
    """Seconds, once the GPU has done all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    ways = ["compiled", "eager"]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens generated")
    parser.add_argument("--repeats", type=int, default=3, help="the median is taken")
    parser.add_argument(
        "--seconds", type=float, default=100, help="begin no cell after so many"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    return parser.parse_args()


if __name__ == "__main__":
    main()
