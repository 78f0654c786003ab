# SPDX-License-Identifier: Apache-2.0
"""
How fast are 2:4 routed experts beside dense ones, while decoding?

Usage::

    PYTHONPATH=. python benchmarks/experts.py [--json FILE] [--vllm] [--tokens 1 2 4 ...]
    PYTHONPATH=. python benchmarks/experts.py --check

Needs a CUDA device, torch and Triton. Random weights of Qwen3-30B-A3B's shape: 128 experts,
8 of a token, 2048 channels, 768 inner ones. All in one run: ``packed`` is our CUDA kernel
on packed weights, ``dense`` a Triton kernel on dense ones, ``expand`` writes the dense
weights of all experts from packed ones and then runs that (for prompts), and ``vllm`` is
vLLM's ``fused_experts``, with --vllm. Each takes the fastest of its settings.
Sorting tokens by expert, SiLU and the sum over experts are in all of them; the router is in
none. Times are medians of CUDA events around replays of a CUDA graph of eight routings,
whose weights together do not fit the L2 cache. ``ratio`` is dense over packed, or vLLM over
packed with --vllm; ``bound`` the share of the copy bandwidth measured in this run that the
packed product reaches. Errors are the largest as a share of the largest output, of float64.
All that was timed is in the JSON; a short table comes last.

--check compares every setting of the packed product with float64, several times over, and
dense; without a GPU only the latter, in Triton's interpreter. It exits with 1 if one is
wrong.
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
from nm_permute_plugin.serving.kernels import experts as our_experts
from nm_permute_plugin.serving.tune import microseconds

EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768
TOKENS = (1, 2, 4, 8, 16, 32, 64)
ROUTINGS = 8
"""So many routings are timed in turn, of other tokens each."""

SIDES = ("dense", "expand", "vllm", "packed")

REPEATS = 30
"""A setting that is checked runs so many times."""

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
    """A layer's weights, dense and packed."""

    up: Tensor
    down: Tensor
    packed_up: our_experts.PackedExperts
    packed_down: our_experts.PackedExperts

    @property
    def packed(self) -> tuple[our_experts.PackedExperts, our_experts.PackedExperts]:
        """Both packed weights."""
        return self.packed_up, self.packed_down


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
    sides = "".join(f"{side:>9}" for side in SIDES)
    lines = [f"tokens experts{sides}  ratio bound"]
    for tokens in arguments.tokens:
        record["results"].append(row := measure(layer, tokens, theirs, record))
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1))
        cells = "".join(
            f"{row[side]:9.1f}" if row.get(side) else "        -" for side in SIDES
        )
        lines.append(
            f"{tokens:6d} {row['experts']:7.1f}{cells}  {row['ratio']:5.2f} "
            f"{row['bound']:5.2f}"
        )
        print(f"{tokens} tokens: errors {row['errors']}, {row['settings']}")
        for settings, taken in row["every"]["packed"]:
            print(f"  {taken:8.2f}  {settings}", flush=True)
    print("", *lines, sep="\n")


def random_layer(
    experts: int, hidden: int, inner: int, dtype: torch.dtype, device: str
) -> Layer:
    """Random 2:4 weights."""
    generator = torch.Generator(device).manual_seed(0)

    def weight(rows: int, columns: int) -> Tensor:
        dense = torch.zeros(experts, rows, columns, dtype=dtype, device=device)
        for expert in range(experts):
            size = (rows, columns // 4, 4)
            order = torch.rand(size, generator=generator, device=device)
            places = order.topk(2).indices.sort().values
            size = (rows, columns // 4, 2)
            kept = torch.randn(size, generator=generator, device=device)
            kept = (kept * columns**-0.5).to(dtype)
            dense[expert].view(rows, -1, 4).scatter_(-1, places, kept)
        return dense

    up, down = weight(2 * inner, hidden), weight(hidden, inner)
    return Layer(up, down, our_experts.pack_experts(up), our_experts.pack_experts(down))


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


def dense_call(layer: Layer, settings: tuple[int, ...], at: Routing) -> Tensor:
    """Run the dense kernel of the same structure."""
    both = layer.up, layer.down
    return dense_experts.run(at.x, *both, at.weights, at.ids, settings)


def packed_call(layer: Layer, settings: tuple[int, ...], at: Routing) -> Tensor:
    """Run our CUDA kernel."""
    return our_experts.run(at.x, *layer.packed, at.weights, at.ids, settings)


def expand_call(layer: Layer, settings: tuple[int, ...], at: Routing) -> Tensor:
    """Write the dense weights where they already are, and run the dense kernel."""
    layer.packed_up.expand(layer.up)
    layer.packed_down.expand(layer.down)
    return dense_call(layer, settings, at)


def vllm_call(layer: Layer) -> Call:
    """Run vLLM's kernel, with the settings that it has for this card."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    def call(at: Routing) -> Tensor:
        return fused_experts(at.x, layer.up, layer.down, at.weights, at.ids)

    return call


def measure(
    layer: Layer,
    tokens: int,
    theirs: Call | None,
    record: dict,
) -> dict:
    """All sides at one number of tokens."""
    routings = [random_routing(layer, tokens, TOP_K, seed) for seed in range(ROUTINGS)]
    expected = exact(layer, routings[0])
    ours = our_experts.candidates(*layer.packed, tokens, TOP_K)
    sides: dict[str, Sequence[tuple[object, Call]]] = {
        "dense": [(s, partial(dense_call, layer, s)) for s in dense_experts.CANDIDATES],
        "packed": [(s, partial(packed_call, layer, s)) for s in ours],
    }
    if tokens * TOP_K > 2 * EXPERTS:
        last = dense_experts.CANDIDATES[-3:]
        sides["expand"] = [(s, partial(expand_call, layer, s)) for s in last]
    if theirs:
        sides["vllm"] = [("vLLM's", theirs)]
    distinct = sum(int(at.ids.unique().numel()) for at in routings) / ROUTINGS
    row: dict = {"tokens": tokens, "experts": distinct, "every": {}, "errors": {}}

    def timed(side: str, call: Call) -> float:
        out = call(routings[0])
        wrong = (out[: len(expected)].double() - expected).abs().max()
        share = round(float(wrong / expected.abs().max()), 5)
        row["errors"][side] = max(row["errors"].get(side, 0.0), share)
        if not share <= 0.02:
            raise RuntimeError(f"results are off by {share}")
        return microseconds([partial(call, at) for at in routings])

    found: dict[str, dict] = {}
    for side, calls in sides.items():
        found[side] = {}
        for setting, call in calls:
            try:
                found[side][setting] = timed(side, call)
            except RuntimeError as error:  # of Triton: no room for the tile
                print(f"{side} {setting}: {str(error).splitlines()[0]}")
    chosen = {side: min(times, key=times.get) for side, times in found.items() if times}
    for side, times in found.items():
        ordered = sorted(times.items(), key=lambda item: item[1])
        row["every"][side] = [(str(name), round(taken, 2)) for name, taken in ordered]
        if side in chosen:
            row[side] = times[chosen[side]]
    read = distinct * sum(weight.packed[0].nbytes for weight in layer.packed)
    rate = record["copy_bytes_per_second"]
    row["ratio"] = row.get("vllm", row["dense"]) / row["packed"]
    row["bound"] = read / rate / (row["packed"] * 1e-6)
    row["settings"] = {side: str(setting) for side, setting in chosen.items()}
    return row


def bandwidth() -> float:
    """Bytes a second of a device-to-device copy, counting those read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    taken = microseconds([lambda: target.copy_(source)], least=30000)
    return 2 * source.nbytes / taken * 1e6


def check() -> None:
    """Compare all kernels with float64; Triton's at shapes that an interpreter can take."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = random_layer(6, 128, 128, torch.float16, device)
    for tokens in (1, 20):
        routing = random_routing(layer, tokens, 2, tokens)
        expected = exact(layer, routing, tokens)
        out = dense_call(layer, (16, 16, 32, 4, 2), routing)
        wrong = float((out - expected).abs().max() / expected.abs().max())
        print(f"dense, {tokens} tokens: off by {wrong:.5f} of the largest output")
        assert wrong < 0.01
    if device == "cuda" and (wrong := wrong_cases()):
        sys.exit(f"{wrong} cases of the packed product are wrong")


def wrong_cases() -> int:
    """
    Print each case in which the packed product is not float64's, and return their number.

    Each setting runs often, before many more are queued, and must give the same bits: the
    kernels of a run overlap, and a race would show as a difference.
    """
    cases, found = 0, 0
    for dtype, count in ((torch.bfloat16, 12), (torch.float16, 40)):
        layer = random_layer(count, HIDDEN, INNER, dtype, "cuda")
        for weight, stored in zip(layer[:2], layer.packed, strict=True):
            if not torch.equal(stored.expand(torch.ones_like(weight)), weight):
                print(f"WRONG: weights of {dtype} came back with other bits")
                found += 1
        for tokens in (1, 5, 16, 64):
            at = random_routing(layer, tokens, TOP_K, tokens)
            expected = exact(layer, at, tokens)
            largest = expected.abs().max()
            for settings in our_experts.candidates(*layer.packed, tokens, TOP_K):
                outs = [packed_call(layer, settings, at) for _ in range(REPEATS)]
                share = float((outs[0] - expected).abs().max() / largest)
                others = sum(not torch.equal(outs[0], out) for out in outs)
                cases += 1
                if not share <= 0.01 or others:
                    case = f"{tokens} tokens, {count} experts of {dtype}, {settings}"
                    told = f"off by {share:.5f}, {others} of {REPEATS} runs differ"
                    print(f"WRONG: {case}: {told}", flush=True)
                    found += 1
    print(f"packed: {cases} cases, {found} wrong")
    return found


if __name__ == "__main__":
    main()
