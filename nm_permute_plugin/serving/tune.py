# SPDX-License-Identifier: Apache-2.0
"""Measure every kernel at every number of tokens, as a server would run it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernel_table import BUCKETS, Bucket, Plan, Way
from nm_permute_plugin.serving.kernels.kernel import WIDE, Kernel

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

# A sparse kernel this much slower than dense is within the noise, and saves memory.
NOISE = 1.02
COLD_BYTES = 128 << 20  # more than any L2 cache holds
TOLERANCE = 0.02  # of the largest output; bfloat16 rounds to 0.004 of each


def tune(weight: Tensor, kernels: Mapping[str, Kernel]) -> Plan:
    """
    The fastest of the kernels for every bucket of tokens, measured on this weight.

    Times are those of replayed CUDA graphs over copies of the weight that together do
    not fit the L2 cache. A kernel that fails, or whose result is wrong, is left out
    with a warning.

    :param weight: [out, in], on a CUDA device
    :param kernels: by name; none of them refuses the weight
    :raises RuntimeError: if no kernel is left for some bucket
    """
    forms = {
        name: cold_copies(kernel.prepare(weight)) for name, kernel in kernels.items()
    }
    buckets = []
    for tokens in BUCKETS:
        x = sample(weight, tokens)
        expected = reference(weight, x)
        fastest: list[Way] = []
        for name, kernel in kernels.items():
            ways = measure(kernel, forms[name], x, expected)
            fastest += sorted(ways, key=lambda way: way.microseconds)[:1]
        if not fastest:
            raise RuntimeError(
                f"no kernel multiplies {tokens} tokens by a weight of shape "
                f"{tuple(weight.shape)}; allowed were {', '.join(kernels)}"
            )
        buckets.append(Bucket(tokens=tokens, chosen=choose(fastest), fastest=fastest))
    return Plan(len(weight), buckets)


def warm_up(weight: Tensor, call: Callable[[Tensor], Tensor], most: int = 64) -> None:
    """
    Call every bucket of few tokens once.

    Our own kernels are compiled and loaded by their first call, which must not come
    while a CUDA graph is captured.
    """
    for tokens in BUCKETS:
        if tokens <= most:
            call(sample(weight, tokens))


def choose(fastest: list[Way]) -> Way:
    """The fastest; a sparse one also where dense is faster by no more than noise."""
    sparse = [way for way in fastest if way.kernel != "dense"]
    best = min(fastest, key=lambda way: way.microseconds)
    if best.kernel != "dense" or not sparse:
        return best
    rival = min(sparse, key=lambda way: way.microseconds)
    return rival if rival.microseconds <= NOISE * best.microseconds else best


def measure(
    kernel: Kernel, copies: list[Tensor], x: Tensor, expected: Tensor
) -> list[Way]:
    """
    How long each setting of a kernel takes; none of those that fail or are wrong.

    :param copies: of the weight in the kernel's form
    :param x: [tokens, in]
    :param expected: the outputs of the first tokens, as ``reference`` makes them
    """
    (tokens, channels), rows = x.shape, expected.shape[1]
    size = f"{tokens} tokens by {rows} x {channels} in {x.dtype}"
    try:
        candidates = kernel.candidates(copies[0], x, rows)
    except RuntimeError as error:
        logger.warning("%s is not used for %s: %s", kernel.name, size, error)
        return []
    ways = []
    for settings in candidates:
        try:
            wrong = error_of(kernel.run(copies[0], x, rows, settings), expected)
            if not wrong <= TOLERANCE:
                raise RuntimeError(f"results are off by {wrong:.3g} of the largest")
            calls = [partial(kernel.run, form, x, rows, settings) for form in copies]
            taken = microseconds(calls)
        except RuntimeError as error:
            logger.warning(
                "%s with %s is not used for %s: %s", kernel.name, settings, size, error
            )
            continue
        ways.append(Way(kernel=kernel.name, settings=settings, microseconds=taken))
    return ways


def cold_copies(form: Tensor) -> list[Tensor]:
    """The tensor and as many copies as it takes for none to stay in the L2 cache."""
    count = max(1, -(-COLD_BYTES // max(1, form.nbytes)))
    return [form] + [form.clone() for _ in range(count - 1)]


def sample(weight: Tensor, tokens: int) -> Tensor:
    """Random tokens [tokens, in] for a weight, of its dtype."""
    # float32 by name: vLLM loads models with another default.
    size = (tokens, weight.shape[1])
    x = torch.empty(size, device=weight.device, dtype=torch.float32)
    x.normal_(generator=torch.Generator(weight.device).manual_seed(tokens))
    if weight.dtype not in WIDE:
        x = (x * 30).round().clamp(-127, 127)
    return x.to(weight.dtype)


def reference(weight: Tensor, x: Tensor, most: int = 64) -> Tensor:
    """The first ``most`` tokens' outputs in float32, by a dense product."""
    return x[:most].float() @ weight.float().t()


def error_of(out: Tensor, expected: Tensor) -> float:
    """The largest error as a share of the largest output."""
    difference = (out[: len(expected)].float() - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(1e-30))


def microseconds(calls: Sequence[Callable[[], Tensor]], least: float = 3000.0) -> float:
    """
    The median time of one call, from a CUDA graph of them all replayed.

    :param least: how long to measure, in microseconds
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    rounds = max(1, 4 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    once = replay(graph, 1)[0]
    times = sorted(replay(graph, max(5, min(50, int(least / max(once, 1.0))))))
    return times[len(times) // 2] / (rounds * len(calls))


def replay(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
    """Microseconds of each of some replays, after one to warm up."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    pairs = zip(marks[:-1], marks[1:], strict=True)
    return [1000 * float(start.elapsed_time(end)) for start, end in pairs]
