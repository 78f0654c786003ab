# SPDX-License-Identifier: Apache-2.0
"""Measures every kernel at every number of tokens, as a server would run it."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernel_table import BUCKETS, Bucket, Choice, KernelTable
from nm_permute_plugin.serving.kernels.kernel import (
    DTYPES_8,
    DTYPES_16,
    Kernel,
    Settings,
)

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

NOISE = 1.02
"""A sparse kernel is preferred if it takes up to this many times as long as the dense one:
so much is noise, and sparse weights save memory."""

COLD_BYTES = 128 << 20
"""Copies of a weight that are timed take this many bytes in all, more than any L2 cache."""

TOLERANCE = 0.02
"""A result may be off by this share of the largest output; bfloat16 rounds by 0.004."""

TOLERANCE_FP8 = 0.06
"""The same for FP8: an H100's own dense product was off by 0.033."""

SLACK = 1.25
"""After a short measurement those candidates stay that took up to this many times as long
as the fastest."""

_DRAWN = 1024
"""So many rows of a random weight are drawn at a time."""

COARSE = (0.0, 3)
"""A short measurement spends so many microseconds, but replays at least so often."""


def tune(
    weight: Tensor,
    kernels: Mapping[str, Kernel],
    parts: "Parts | None" = None,
    tell: Callable[[str], object] = lambda kernel: None,
) -> KernelTable:
    """
    Find the fastest kernel for every bucket of tokens, measured on this weight.

    Times are those of replayed CUDA graphs over copies of the weight that together do
    not fit the L2 cache. A kernel that fails, or whose result is wrong, is left out
    with a warning.

    :param weight: [out, in], on a CUDA device
    :param kernels: the kernels by name, all of which support the weight
    :param parts: takes the seconds of each part of the work
    :param tell: takes the name of each kernel before it runs
    :raises RuntimeError: if no kernel is left for some bucket
    """
    parts = Parts() if parts is None else parts
    copies = {}
    for name, kernel in kernels.items():
        tell(name)
        with parts.part("pack"):
            copies[name] = cold_copies(kernel.prepare(weight))
    buckets, before = [], dict[str, Settings]()
    for tokens in BUCKETS:
        with parts.part("reference"):
            x = random_tokens(weight, tokens)
            expected = reference(weight, x)
        contest = Contest(x, expected, parts)
        for name, kernel in kernels.items():
            tell(name)
            contest.add(kernel, copies[name], before.get(name))
        finals, dropped = contest.decide()
        if not finals:
            raise RuntimeError(
                f"no kernel multiplies {tokens} tokens by a weight of shape "
                f"{tuple(weight.shape)}; allowed were {', '.join(kernels)}"
            )
        chosen, fastest = choose(finals), fastest_of([*finals, *dropped])
        buckets.append(Bucket(tokens=tokens, chosen=chosen, fastest=fastest))
        before = {choice.kernel: choice.settings for choice in fastest}
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
            if not wrong <= tolerance_of(x.dtype):
                return f"{said} is off by {wrong:.3g} of the largest result"
    except RuntimeError as error:
        return f"{said}: {error}"
    return None


def choose(choices: list[Choice]) -> Choice:
    """Choose the fastest kernel; a sparse one also if dense wins by no more than noise."""
    sparse = [choice for choice in choices if choice.kernel != "dense"]
    best = min(choices, key=lambda choice: choice.microseconds)
    if best.kernel != "dense" or not sparse:
        return best
    second = min(sparse, key=lambda choice: choice.microseconds)
    return second if second.microseconds <= NOISE * best.microseconds else best


def fastest_of(choices: list[Choice]) -> list[Choice]:
    """Return the fastest choice of every kernel."""
    best: dict[str, Choice] = {}
    for choice in sorted(choices, key=lambda choice: choice.microseconds):
        best.setdefault(choice.kernel, choice)
    return list(best.values())


class Candidate(NamedTuple):
    """A kernel with settings that computes right, captured so that it can be timed."""

    kernel: str
    settings: Settings
    recording: "Recording"


class Contest:
    """
    Finds the fastest of the kernels and settings that multiply some tokens right.

    :param x: [tokens, in]
    :param expected: the outputs of the first tokens, from ``reference``
    :param parts: takes the seconds of each part of the work
    """

    def __init__(
        self, x: Tensor, expected: Tensor, parts: "Parts | None" = None
    ) -> None:
        self._x, self._expected = x, expected
        self._parts = Parts() if parts is None else parts
        self._candidates: list[Candidate] = []

    def add(
        self, kernel: Kernel, copies: list[Tensor], before: Settings | None = None
    ) -> None:
        """
        Add a kernel's settings; those that fail or give wrong results are left out.

        :param copies: copies of the weight, packed for the kernel
        :param before: the best settings for fewer tokens, which are tried as well
        """
        (tokens, _), rows = self._x.shape, self._expected.shape[1]
        try:
            with self._parts.part(f"settings of {kernel.name}"):
                every = kernel.candidates(copies[0], self._x, rows)
        except RuntimeError as error:
            self._leave_out(kernel.name, error)
            return
        if before is not None and kernel.takes(self._x, tokens, before):
            every = list(dict.fromkeys([*every, before]))
        for settings in every:
            try:
                recording = self._recorded(kernel, copies, settings)
            except RuntimeError as error:
                self._leave_out(f"{kernel.name} with {settings}", error)
                continue
            self._candidates.append(Candidate(kernel.name, settings, recording))

    def decide(self, slack: float = SLACK) -> tuple[list[Choice], list[Choice]]:
        """
        Time all shortly; those that may be the fastest, and dense, as long as it takes.

        :param slack: those stay that took up to so many times as long as the fastest
        :return: the choices that were timed in full, and the others
        """
        with self._parts.part("coarse"):
            times = [each.recording.microseconds(*COARSE) for each in self._candidates]
        most = slack * min(times, default=0.0)
        finals, dropped = [], []
        for (kernel, settings, recording), taken in zip(
            self._candidates, times, strict=True
        ):
            if taken <= most or kernel == "dense":
                with self._parts.part("fine"):
                    taken = recording.microseconds()
                finals.append(Choice(kernel, settings, taken))
            else:
                dropped.append(Choice(kernel, settings, taken))
        return finals, dropped

    def _recorded(
        self, kernel: Kernel, copies: list[Tensor], settings: Settings
    ) -> "Recording":
        rows = self._expected.shape[1]
        calls = [partial(kernel.run, each, self._x, rows, settings) for each in copies]
        with self._parts.part("check"):
            wrong = error_of(calls[0](), self._expected)
        if not wrong <= tolerance_of(self._x.dtype):
            raise RuntimeError(f"results are off by {wrong:.3g} of the largest")
        with self._parts.part("capture"):
            other = self._candidates[0].recording if self._candidates else None
            return Recording(calls, other)

    def _leave_out(self, what: str, error: RuntimeError) -> None:
        """Warn; a failure that broke the card's context is raised by the next call."""
        (tokens, channels), rows = self._x.shape, self._expected.shape[1]
        size = f"{tokens} tokens by {rows} x {channels} in {self._x.dtype}"
        logger.warning("%s is not used for %s: %s", what, size, error)
        if self._x.is_cuda:
            torch.cuda.synchronize()


def cold_copies(packed: Tensor) -> list[Tensor]:
    """Copy a packed weight until its copies together do not fit the L2 cache."""
    count = max(1, -(-COLD_BYTES // max(1, packed.nbytes)))
    return [packed] + [packed.clone() for _ in range(count - 1)]


def random_weight(
    shape: tuple[int, int], dtype: torch.dtype, device: str | torch.device
) -> Tensor:
    """Draw a 2:4 weight [out, in]; those of 8 bits are whole numbers."""
    rows, channels = shape
    generator = torch.Generator(device).manual_seed(rows + channels)
    weight = torch.empty(shape, dtype=dtype, device=device)
    for part in weight.split(_DRAWN):  # a card that holds a model has little room
        size = (len(part), channels // 4, 4)
        values = torch.empty(size, dtype=torch.float32, device=device)
        values.normal_(generator=generator)
        dropped = values.abs().topk(2, -1, largest=False).indices
        values.scatter_(-1, dropped, 0)
        if dtype in DTYPES_8:
            values = (values * 40).round().clamp(-127, 127) + 0.0  # no -0.0
        part.copy_(values.view(part.shape))
    return weight


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


def tolerance_of(dtype: torch.dtype) -> float:
    """How far a result may be off: sums of FP8 products keep fewer bits than float32."""
    return TOLERANCE_FP8 if dtype == torch.float8_e4m3fn else TOLERANCE


def error_of(out: Tensor, expected: Tensor) -> float:
    """Return the largest error as a share of the largest output."""
    difference = (out[: len(expected)].float() - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(1e-30))


def microseconds(calls: Sequence[Callable[[], Tensor]], least: float = 3000.0) -> float:
    """
    Return the median time of one call, from replays of a CUDA graph of all calls.

    :param least: the time to spend on replays, in microseconds
    """
    return Recording(calls).microseconds(least)


class Recording:
    """
    A CUDA graph of calls, which can be timed again and again.

    :param calls: one or more
    :param other: a graph whose memory is used as well: they run one after the other
    """

    def __init__(
        self,
        calls: Sequence[Callable[[], Tensor]],
        other: "Recording | None" = None,
    ) -> None:
        pool = None if other is None else other._graph.pool()
        rounds = max(1, 4 // len(calls))
        self._count = rounds * len(calls)
        self._graph: torch.cuda.CUDAGraph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=pool):
            for _ in range(rounds):
                for call in calls:
                    call()

    def microseconds(self, least: float = 3000.0, fewest: int = 5) -> float:
        """
        Return the median time of one call.

        :param least: the time to spend on replays, in microseconds
        :param fewest: the least number of replays
        """
        once = replay(self._graph, 1)[0]
        times = sorted(
            replay(self._graph, max(fewest, min(50, int(least / max(once, 1.0)))))
        )
        return times[len(times) // 2] / self._count


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


class Parts(dict[str, float]):
    """The seconds that each part of the work took."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + time.perf_counter() - started
