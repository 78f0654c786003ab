# SPDX-License-Identifier: Apache-2.0
"""
Measures the kernels of all a model's weights in one process of its own.

A crash ends that process only: cuSPARSELt's search crashes for some shapes ("illegal
instruction", version 0.8). The kernel that crashed is left out for its shape, and a new
process measures what is left.
"""

import faulthandler
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernel_table import KernelTable
from nm_permute_plugin.serving.ops import KERNELS
from nm_permute_plugin.serving.tune import Parts, random_weight, tune

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

TIMEOUT = 180
"""A kernel that takes longer than this many seconds for a shape counts as crashed."""


class Asked(NamedTuple):
    """
    What is to be measured.

    :param rows: of the weight
    :param channels: of the weight
    :param dtype: of the weight, such as ``bfloat16``
    :param kernels: the names of those that may be chosen
    """

    rows: int
    channels: int
    dtype: str
    kernels: list[str]

    @classmethod
    def of(cls, weight: Tensor, kernels: list[str]) -> "Asked":
        """Ask for a weight, of which shape and dtype count."""
        dtype = str(weight.dtype).removeprefix("torch.")
        return cls(weight.shape[0], weight.shape[1], dtype, list(kernels))

    def __str__(self) -> str:
        return f"weights of shape {(self.rows, self.channels)}, {self.dtype}"


class Measured(NamedTuple):
    """
    What came out, by the names under which it was asked for.

    :param tables: the kernel tables
    :param faults: why there is no table
    :param crashes: how kernels crashed, by name and kernel
    :param seconds: what took how long, by name and part; under "" the processes
    """

    tables: dict[str, KernelTable]
    faults: dict[str, str]
    crashes: dict[tuple[str, str], str]
    seconds: dict[str, dict[str, float]]


Process = subprocess.Popen[str]


def start() -> Process:
    """
    Start a process that gets ready, leaves the card alone, and waits for what is asked.

    It ends if this process ends before it asked.

    :raises OSError: if the system allows no more processes
    """
    command, pipe = [sys.executable, "-m", __name__], subprocess.PIPE
    return Process(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def measure(
    asked: Mapping[str, Asked], device: torch.device, process: Process | None = None
) -> Measured:
    """
    Measure kernels on random 2:4 weights, in a process; in a new one after each crash.

    :param asked: by name
    :param device: the CUDA device
    :param process: of ``start``, which is used up
    """
    left = dict(asked)
    measured = Measured({}, {}, {}, {})
    while left:
        try:
            reason, trying = _run(process or start(), left, device, measured)
        except OSError as error:
            reason, trying = f"no process can be started: {error}", _NOTHING
        process = None
        for name in {**measured.tables, **measured.faults}:
            left.pop(name, None)
        if not left:
            break
        reason = reason or "a process that tried it ended early"
        name, kernel = trying
        if name not in left:  # it did not come to a kernel
            measured.faults.update(dict.fromkeys(left, reason))
            break
        logger.warning("%s is not used for %s: %s", kernel, left[name], reason)
        measured.crashes[name, kernel] = reason
        others = [other for other in left[name].kernels if other != kernel]
        left[name] = left[name]._replace(kernels=others)
        if not others:
            measured.faults[name] = reason
            del left[name]
    return measured


def crash_reason(kernel: str, weight: Tensor) -> str | None:
    """
    Measure a kernel in a process; return how that crashed, or None.

    :param weight: its shape, dtype and device count, not its values
    """
    measured = measure({"": Asked.of(weight, [kernel])}, weight.device)
    return measured.crashes.get(("", kernel))


def _run(
    process: Process,
    asked: Mapping[str, Asked],
    device: torch.device,
    measured: Measured,
) -> tuple[str | None, tuple[str, str]]:
    """
    Ask a process, and add what it measured.

    :return: how it crashed, or None; the name and the kernel that it came to
    """
    request = json.dumps({"device": str(device), "asked": asked, "at": time.time()})
    most = TIMEOUT * (1 + len(asked))
    try:
        output, errors = process.communicate(request, most)
        reason = None
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        reason = f"a process that tried it had not ended after {most} s"
    trying = _read(output, measured)
    code = process.returncode
    if reason or not code:
        return reason, trying
    ended = (
        f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    )
    last = errors.strip().splitlines()[-1:]
    return ": ".join([f"a process that tried it ended with {ended}", *last]), trying


def _read(output: str, measured: Measured) -> tuple[str, str]:
    """Add what a process said; return the last name and kernel that it tried."""
    trying = _NOTHING
    for line in output.splitlines():
        if not line.startswith(_MARK):
            continue  # a library's words
        what, name, said = json.loads(line.removeprefix(_MARK))
        if what == "trying":
            trying = (name, said)
        elif what == "table":
            measured.tables[name] = KernelTable.from_json(said)
        elif what == "fault":
            measured.faults[name] = said
        elif what == "seconds":
            measured.seconds[name] = said
        else:
            logger.warning("%s", said)
    return trying


_NOTHING = ("", "no kernel")
"""What a process came to that came to no kernel."""

_MARK = "nm-permute: "
"""Begins the lines that the process means for us."""


def _say(what: str, name: str, said: object) -> None:
    print(f"{_MARK}{json.dumps([what, name, said])}", flush=True)


class _Passed(logging.Handler):
    """Passes warnings on to the process that asked."""

    def emit(self, record: logging.LogRecord) -> None:
        _say("warning", "", record.getMessage())


def main() -> None:
    """Measure what stdin asks for; each table is said as soon as it is found."""
    logging.getLogger("vllm").addHandler(_Passed(logging.WARNING))
    words = sys.stdin.read()
    if not words:
        return  # who started this has ended, or asks nothing
    request: dict[str, Any] = json.loads(words)
    device = torch.device(request["device"])
    started = time.perf_counter()
    torch.cuda.set_device(device)
    torch.cuda.synchronize()
    context = time.perf_counter() - started
    waited = time.time() - request["at"] - context
    _say("seconds", "", {"start of the process": waited, "CUDA's context": context})
    for name, fields in request["asked"].items():
        _measure_one(name, Asked(*fields), device)
        torch.cuda.empty_cache()


def _measure_one(name: str, asked: Asked, device: torch.device) -> None:
    parts = Parts()
    started = time.perf_counter()

    def tell(kernel: str) -> None:
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
        _say("trying", name, kernel)

    shape = (asked.rows, asked.channels)
    try:
        weight = random_weight(shape, getattr(torch, asked.dtype), device)
        kernels = {kernel: KERNELS[kernel] for kernel in asked.kernels}
        table = tune(weight, kernels, parts, tell)
    except RuntimeError as error:
        torch.cuda.synchronize()  # raises if the context is lost
        _say("fault", name, str(error))
    else:
        _say("table", name, table.to_json())
    faulthandler.cancel_dump_traceback_later()
    parts["other"] = time.perf_counter() - started - sum(parts.values())
    _say("seconds", name, parts)


if __name__ == "__main__":
    main()
