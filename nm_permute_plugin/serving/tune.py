# SPDX-License-Identifier: Apache-2.0
"""Measures every kernel at every number of tokens, as a server would run it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernel_table import BUCKETS, Bucket, Choice, KernelTable
from nm_permute_plugin.serving.kernels.kernel import DTYPES_16, Kernel

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

NOISE = 1.02
"""A sparse kernel is preferred if it takes up to this many times as long as the dense one:
so much is noise, and sparse weights save memory."""

COLD_BYTES = 128 << 20
"""Copies of a weight that are timed take this many bytes in all, more than any L2 cache."""

TOLERANCE = 0.02
"""A result may be off by this share of the largest output; bfloat16 rounds by 0.004."""


def tune(weight: Tensor, kernels: Mapping[str, Kernel]) -> KernelTable:
    """
    Find the fastest kernel for every bucket of tokens, measured on this weight.

    Times are those of replayed CUDA graphs over copies of the weight that together do
    not fit the L2 cache. A kernel that fails, or whose result is wrong, is left out
    with a warning.

    :param weight: [out, in], on a CUDA device
    :param kernels: the kernels by name, all of which support the weight
    :raises RuntimeError: if no kernel is left for some bucket
    """
    copies = {n: cold_copies(kernel.prepare(weight)) for n, kernel in kernels.items()}
    buckets = []
    for tokens in BUCKETS:
        x = random_tokens(weight, tokens)
        expected = reference(weight, x)
        fastest: list[Choice] = []
        for name, kernel in kernels.items():
            choices = measure_kernel(kernel, copies[name], x, expected)
            fastest += sorted(choices, key=lambda choice: choice.microseconds)[:1]
        if not fastest:
            raise RuntimeError(
                f"no kernel multiplies {tokens} tokens by a weight of shape "
                f"{tuple(weight.shape)}; allowed were {', '.join(kernels)}"
            )
        buckets.append(Bucket(tokens=tokens, chosen=choose(fastest), fastest=fastest))
    return KernelTable(len(weight), buckets)


def warm_up(weight: Tensor, call: Callable[[Tensor], Tensor], most: int = 64) -> None:
    """
    Call a layer once for each bucket of up to ``most`` tokens.

    The first call compiles and loads our own kernels, which must not happen while a CUDA
    graph is captured.
    """
    for tokens in BUCKETS:
        if tokens <= most:
            call(random_tokens(weight, tokens))


def fault_of(
    table: KernelTable, weight: Tensor, kernels: Mapping[str, Kernel]
) -> str | None:
    """
    Run every choice of a table that was kept; return what is wrong with it, or None.

    :param weight: [out, in], for which the table was made
    :param kernels: the kernels by name, all that the table chooses
    """
    sizes = tuple(bucket.tokens for bucket in table.buckets)
    if sizes != BUCKETS:
        return f"it is for {sizes} tokens"
    said = "packing"
    try:
        packed = {name: kernels[name].prepare(weight) for name in table.kernels}
        for tokens, (name, settings, _), _ in table.buckets:
            said = f"{name} with {settings} for {tokens} tokens"
            if not kernels[name].takes(weight, tokens, settings):
                return f"{said} does not exist"
            x = random_tokens(weight, tokens)
            out = kernels[name].run(packed[name], x, len(weight), settings)
            wrong = error_of(out, reference(weight, x))
            if not wrong <= TOLERANCE:
                return f"{said} is off by {wrong:.3g} of the largest result"
    except RuntimeError as error:
        return f"{said}: {error}"
    return None


def choose(fastest: list[Choice]) -> Choice:
    """Choose the fastest kernel; a sparse one also if dense wins by no more than noise."""
    sparse = [choice for choice in fastest if choice.kernel != "dense"]
    best = min(fastest, key=lambda choice: choice.microseconds)
    if best.kernel != "dense" or not sparse:
        return best
    second = min(sparse, key=lambda choice: choice.microseconds)
    return second if second.microseconds <= NOISE * best.microseconds else best


def measure_kernel(
    kernel: Kernel, copies: list[Tensor], x: Tensor, expected: Tensor
) -> list[Choice]:
    """
    Time each setting of a kernel; those that fail or give wrong results are left out.

    :param copies: copies of the weight, packed for the kernel
    :param x: [tokens, in]
    :param expected: the outputs of the first tokens, from ``reference``
    """
    (tokens, channels), rows = x.shape, expected.shape[1]
    size = f"{tokens} tokens by {rows} x {channels} in {x.dtype}"
    try:
        candidates = kernel.candidates(copies[0], x, rows)
    except RuntimeError as error:
        logger.warning("%s is not used for %s: %s", kernel.name, size, error)
        return []
    choices = []
    for settings in candidates:
        try:
            wrong = error_of(kernel.run(copies[0], x, rows, settings), expected)
            if not wrong <= TOLERANCE:
                raise RuntimeError(f"results are off by {wrong:.3g} of the largest")
            calls = [
                partial(kernel.run, packed, x, rows, settings) for packed in copies
            ]
            taken = microseconds(calls)
        except RuntimeError as error:
            logger.warning(
                "%s with %s is not used for %s: %s", kernel.name, settings, size, error
            )
            continue
        choices.append(Choice(kernel.name, settings, taken))
    return choices


def cold_copies(packed: Tensor) -> list[Tensor]:
    """Copy a packed weight until its copies together do not fit the L2 cache."""
    count = max(1, -(-COLD_BYTES // max(1, packed.nbytes)))
    return [packed] + [packed.clone() for _ in range(count - 1)]


def random_tokens(weight: Tensor, tokens: int) -> Tensor:
    """Draw random tokens [tokens, in] for a weight, of its dtype."""
    # float32 by name: while vLLM loads a model, the default dtype is another.
    size = (tokens, weight.shape[1])
    x = torch.empty(size, device=weight.device, dtype=torch.float32)
    x.normal_(generator=torch.Generator(weight.device).manual_seed(tokens))
    if weight.dtype not in DTYPES_16:
        x = (x * 30).round().clamp(-127, 127)
    return x.to(weight.dtype)


def reference(weight: Tensor, x: Tensor, most: int = 64) -> Tensor:
    """Compute the outputs of the first ``most`` tokens in float32, by a dense product."""
    return x[:most].float() @ weight.float().t()


def error_of(out: Tensor, expected: Tensor) -> float:
    """Return the largest error as a share of the largest output."""
    difference = (out[: len(expected)].float() - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(1e-30))


def microseconds(calls: Sequence[Callable[[], Tensor]], least: float = 3000.0) -> float:
    """
    Return the median time of one call, from replays of a CUDA graph of all calls.

    :param least: the time to spend on replays, in microseconds
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
    """Return the microseconds of each replay of a graph, after one to warm up."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    pairs = zip(marks[:-1], marks[1:], strict=True)
    return [1000 * float(start.elapsed_time(end)) for start, end in pairs]
