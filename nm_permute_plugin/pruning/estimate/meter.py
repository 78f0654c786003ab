# SPDX-License-Identifier: Apache-2.0
"""Time and memory of pieces of work on a device."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

from nm_permute_plugin.pruning.running.memory import free_bytes

T = TypeVar("T")

EVERY = 0.005
"""Seconds from one look at the process's memory to the next."""


@dataclass(frozen=True)
class Took:
    """
    How long something takes.

    :param seconds: by the clock
    :param cpu_seconds: of all processors together, which other programs do not change
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: "Took") -> "Took":
        return Took(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)

    def __mul__(self, times: float | int) -> "Took":
        return Took(self.seconds * times, self.cpu_seconds * times)

    def less(self, other: "Took") -> "Took":
        """The difference; 0 where there is none but noise."""
        return Took(
            max(0.0, self.seconds - other.seconds),
            max(0.0, self.cpu_seconds - other.cpu_seconds),
        )


@dataclass
class Peak:
    """The most bytes that were taken while a context lasted."""

    value: int = 0


class Meter:
    """
    Measures work on one device.

    On a GPU memory is what tensors take there; on a CPU all that the process holds.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"

    def took(self, run: Callable[[], T], times: int = 1) -> tuple[T, Took]:
        """
        Run something, and measure how long one run takes.

        :param times: how often it runs; the mean is what is returned
        """
        started, cpu = self._now(), time.process_time()
        for _ in range(times):
            found = run()
        seconds = self._now() - started
        return found, Took(seconds, time.process_time() - cpu) * (1 / times)

    def held(self) -> int:
        """The bytes that are taken now."""
        if self._on_gpu:
            return torch.cuda.memory_allocated(self.device)
        return int(psutil.Process().memory_info().rss)

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """Tell the most bytes that are taken while the context lasts, once it has ended."""
        peak = Peak()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            try:
                yield peak
            finally:
                peak.value = torch.cuda.max_memory_allocated(self.device)
            return
        done = threading.Event()

        def watch() -> None:
            while not done.wait(EVERY):
                peak.value = max(peak.value, self.held())

        peak.value = self.held()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield peak
        finally:
            done.set()
            watcher.join()
            peak.value = max(peak.value, self.held())

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def free_memory(device: torch.device) -> int:
    """The bytes that a device has free: of a GPU, or of this machine."""
    free = free_bytes(device)
    return int(psutil.virtual_memory().available) if free is None else free
