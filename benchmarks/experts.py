# SPDX-License-Identifier: Apache-2.0
"""
How fast are 2:4 routed experts beside dense ones, while decoding?

Usage::

    PYTHONPATH=. python benchmarks/experts.py [--json FILE] [--vllm] [--tokens 1 2 4 ...]
    PYTHONPATH=. python benchmarks/experts.py --check

Needs a CUDA device, torch and Triton. Random weights of Qwen3-30B-A3B's shape: 128 experts,
8 of a token, 2048 channels, 768 inner ones. All in one run: ``sparse`` is our kernel on the
weights as they are stored, ``dense`` a Triton kernel of the same structure on dense ones,
``expand`` writes the dense weights of all experts and then runs that (for prompts), and
``vllm`` is vLLM's ``fused_experts``, with --vllm. Each takes the fastest of its settings.
Sorting tokens by expert, SiLU and the sum over experts are in all of them; the router is in
none. Times are medians of CUDA events around replays of a CUDA graph of eight routings,
whose weights together do not fit the L2 cache. ``ratio`` is dense over sparse, or vLLM over
sparse with --vllm; ``bound`` the share of the copy bandwidth measured in this run that the
sparse product reaches. Errors are the largest as a share of the largest output, of float64.

--check compares sparse and dense with float64 on small shapes; without a GPU, in Triton's
interpreter.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

if "--check" in sys.argv:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from torch import Tensor

from benchmarks import dense_experts
from nm_permute_plugin.serving.kernels import experts as sparse_experts
from nm_permute_plugin.serving.tune import microseconds

EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768
TOKENS = (1, 2, 4, 8, 16, 32, 64)
ROUTINGS = 8
"""So many routings are timed in turn, of other tokens each."""

Call = Callable[["Routing"], Tensor]


class Routing(NamedTuple):
    """
    Tokens and their experts.

    :param x: [tokens, hidden]
    :param weights: float32 [tokens, k]
    :param ids: int32 [tokens, k]
    """

    x: Tensor
    weights: Tensor
    ids: Tensor


class Layer(NamedTuple):
    """A layer's weights, dense and as they are stored."""

    up: Tensor
    down: Tensor
    stored_up: sparse_experts.StoredExperts
    stored_down: sparse_experts.StoredExperts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--vllm", action="store_true", help="beside vLLM's kernel")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--check", action="store_true", help="compare with float64")
    arguments = parser.parse_args()
    if arguments.check:
        check()
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/experts.py needs a CUDA device; --check does not")
    record = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": [EXPERTS, TOP_K, HIDDEN, INNER],
        "copy_bytes_per_second": bandwidth(),
        "results": [],
    }
    print(record)
    layer = random_layer(EXPERTS, HIDDEN, INNER, torch.bfloat16, "cuda")
    theirs = vllm_call(layer) if arguments.vllm else None
    print("tokens experts    dense   expand     vllm   sparse  ratio bound  errors")
    for tokens in arguments.tokens:
        record["results"].append(row := measure(layer, tokens, theirs, record))
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1))
        cells = "".join(
            f"{row[side]:9.1f}" if row.get(side) else "        -"
            for side in ("dense", "expand", "vllm", "sparse")
        )
        print(
            f"{tokens:6d} {row['experts']:7.1f}{cells}  {row['ratio']:5.2f} "
            f"{row['bound']:5.2f}  {row['errors']}  {row['settings']}",
            flush=True,
        )


def random_layer(
    experts: int, hidden: int, inner: int, dtype: torch.dtype, device: str
) -> Layer:
    """Random 2:4 weights."""
    generator = torch.Generator(device).manual_seed(0)

    def weight(rows: int, columns: int) -> tuple[Tensor, sparse_experts.StoredExperts]:
        dense = torch.zeros(experts, rows, columns, dtype=dtype, device=device)
        values = dense.new_empty(experts, rows, columns // 2)
        bits = values.new_empty(experts, rows, columns // 8, dtype=torch.uint8)
        for expert in range(experts):
            size = (rows, columns // 4, 4)
            order = torch.rand(size, generator=generator, device=device)
            places = order.topk(2).indices.sort().values
            size = (rows, columns // 4, 2)
            kept = torch.randn(size, generator=generator, device=device)
            kept = (kept * columns**-0.5).to(dtype)
            dense[expert].view(rows, -1, 4).scatter_(-1, places, kept)
            values[expert] = kept.view(rows, -1)
            nibbles = (1 << places).sum(-1).view(rows, -1, 2)
            bits[expert] = nibbles[..., 0] | nibbles[..., 1] << 4
        return dense, sparse_experts.StoredExperts(values, bits)

    up, stored_up = weight(2 * inner, hidden)
    down, stored_down = weight(hidden, inner)
    return Layer(up, down, stored_up, stored_down)


def random_routing(layer: Layer, tokens: int, top_k: int, seed: int) -> Routing:
    """Random tokens, each with so many experts, all as likely."""
    device = layer.up.device
    generator = torch.Generator(device).manual_seed(seed)
    size = (tokens, layer.up.shape[2])
    x = torch.randn(size, generator=generator, device=device).to(layer.up.dtype)
    logits = torch.randn(tokens, len(layer.up), generator=generator, device=device)
    weights, ids = logits.softmax(-1).topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    return Routing(x, weights, ids.to(torch.int32))


def exact(layer: Layer, routing: Routing, most: int = 16) -> Tensor:
    """The experts' sum of the first tokens in float64."""
    x = routing.x[:most].double()
    out = torch.zeros_like(x)
    for token, (scales, chosen) in enumerate(
        zip(routing.weights[:most].double(), routing.ids[:most].long(), strict=True)
    ):
        for scale, expert in zip(scales, chosen, strict=True):
            gate, value = (layer.up[expert].double() @ x[token]).chunk(2)
            inner = torch.nn.functional.silu(gate) * value
            out[token] += scale * (layer.down[expert].double() @ inner)
    return out


def sparse_call(layer: Layer, settings: tuple[int, ...], at: Routing) -> Tensor:
    """Run our kernel."""
    stored = layer.stored_up, layer.stored_down
    return sparse_experts.run(at.x, *stored, at.weights, at.ids, settings)


def dense_call(layer: Layer, settings: tuple[int, ...], at: Routing) -> Tensor:
    """Run the dense kernel of the same structure."""
    both = layer.up, layer.down
    return dense_experts.run(at.x, *both, at.weights, at.ids, settings)


def expand_call(layer: Layer, settings: tuple[int, ...], at: Routing) -> Tensor:
    """Write the dense weights where they already are, and run the dense kernel."""
    layer.stored_up.expand(layer.up)
    layer.stored_down.expand(layer.down)
    return dense_call(layer, settings, at)


def vllm_call(layer: Layer) -> Call:
    """Run vLLM's kernel, with the settings that it has for this card."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    def call(at: Routing) -> Tensor:
        return fused_experts(at.x, layer.up, layer.down, at.weights, at.ids)

    return call


def measure(layer: Layer, tokens: int, theirs: Call | None, record: dict) -> dict:
    """All sides at one number of tokens."""
    routings = [random_routing(layer, tokens, TOP_K, seed) for seed in range(ROUTINGS)]
    expected = exact(layer, routings[0])
    settings = sparse_experts.candidates(tokens, TOP_K, EXPERTS)
    prompts = tokens * TOP_K > 2 * EXPERTS
    sides: dict[str, Sequence[tuple[object, Call]]] = {
        "dense": [(s, partial(dense_call, layer, s)) for s in dense_experts.CANDIDATES],
        "sparse": [(s, partial(sparse_call, layer, s)) for s in settings],
    }
    if prompts:
        last = dense_experts.CANDIDATES[-3:]
        sides["expand"] = [(s, partial(expand_call, layer, s)) for s in last]
    if theirs:
        sides["vllm"] = [("vLLM's", theirs)]
    distinct = sum(int(at.ids.unique().numel()) for at in routings) / ROUTINGS
    row: dict = {"tokens": tokens, "experts": distinct, "every": {}, "errors": {}}
    chosen = {}
    for side, calls in sides.items():
        times = {}
        for setting, call in calls:
            try:
                out = call(routings[0])
                wrong = (out[: len(expected)].double() - expected).abs().max()
                row["errors"].setdefault(side, 0.0)
                share = float(wrong / expected.abs().max())
                row["errors"][side] = max(row["errors"][side], round(share, 5))
                times[setting] = microseconds([partial(call, at) for at in routings])
            except RuntimeError as error:  # of Triton: no room for the tile
                print(f"{side} {setting}: {str(error).splitlines()[0]}")
        row["every"][side] = [(str(name), round(t, 2)) for name, t in times.items()]
        if times:
            chosen[side] = min(times, key=lambda setting: times[setting])
            row[side] = times[chosen[side]]
    read = distinct * sum(w.values[0].nbytes + w.bits[0].nbytes for w in layer[2:])
    rate = record["copy_bytes_per_second"]
    row["ratio"] = row.get("vllm", row["dense"]) / row["sparse"]
    row["bound"] = read / rate / (row["sparse"] * 1e-6)
    row["settings"] = {side: str(setting) for side, setting in chosen.items()}
    return row


def bandwidth() -> float:
    """Bytes a second of a device-to-device copy, counting those read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    taken = microseconds([lambda: target.copy_(source)], least=30000)
    return 2 * source.nbytes / taken * 1e6


def check() -> None:
    """Compare both kernels with float64, at shapes that an interpreter can take."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = random_layer(6, 64, 32, torch.float16, device)
    for tokens in (1, 20):
        routing = random_routing(layer, tokens, 2, tokens)
        expected = exact(layer, routing, tokens)
        for name, out in {
            "sparse": sparse_call(layer, (16, 16, 16, 32, 16, 0, 4, 2), routing),
            "dense": dense_call(layer, (16, 16, 32, 4, 2), routing),
            "expand": expand_call(layer, (16, 16, 32, 4, 2), routing),
        }.items():
            wrong = float((out - expected).abs().max() / expected.abs().max())
            print(f"{name}, {tokens} tokens: off by {wrong:.5f} of the largest output")
            assert wrong < 0.01, name


if __name__ == "__main__":
    main()
