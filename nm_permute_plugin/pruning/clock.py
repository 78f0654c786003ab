# SPDX-License-Identifier: Apache-2.0
"""Seconds and memory by stage, and the machine that they were measured on."""

import os
import platform
import threading
import time
from pathlib import Path

import psutil
import torch
from loguru import logger
from torch import nn

from nm_permute_plugin._words import memory_size

BETWEEN_LOOKS = 0.1
"""Seconds from one look at the memory to the next."""


class Clock:
    """
    The seconds and the most memory of every stage; one log line a stage.

    Memory is what PyTorch holds on a GPU, or what the process holds where the model runs on
    the CPU. It is looked at ten times a second, in a thread of its own, because to
    reset the peak that PyTorch counts would take it from whoever else reads it; where
    that peak rises in a stage, it is the stage's.

    :ivar seconds: by stage
    :ivar memory: bytes by stage
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self._device = device
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._look_often, daemon=True)

    def __enter__(self) -> "Clock":
        self._begin()
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._watch.join()

    def lap(self, stage: str) -> None:
        """The stage that began with the last lap ends; of its laps the sum is kept."""
        took = time.perf_counter() - self._started
        self.seconds[stage] = self.seconds.get(stage, 0.0) + took
        risen = self._counted()
        peak = max(self._most, self._held(), risen if risen > self._before else 0)
        self.memory[stage] = max(peak, self.memory.get(stage, 0))
        logger.info(
            f"The stage {stage} took {took:.1f} s and at most {memory_size(peak)}"
        )
        self._begin()

    def _begin(self) -> None:
        self._started = time.perf_counter()
        self._most, self._before = self._held(), self._counted()

    def _look_often(self) -> None:
        while not self._stop.wait(BETWEEN_LOOKS):
            self._most = max(self._most, self._held())

    def _held(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.memory_allocated(self._device))
        return int(self._process.memory_info().rss)

    def _counted(self) -> int:
        """The peak that PyTorch counts, since whoever reset it; 0 on a CPU."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return 0


def environment(model: nn.Module) -> dict[str, str | int]:
    """The machine, and how the model runs on it: words and numbers for the record."""
    weight = next(model.parameters())
    found: dict[str, str | int] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
    if weight.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(weight.device)
        found["gpu_memory"] = torch.cuda.get_device_properties(
            weight.device
        ).total_memory
        found["cuda"] = str(torch.version.cuda)
    return found


def _processor() -> str:
    """The name of the processor; its kind where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, "").strip() or platform.processor() or platform.machine()
