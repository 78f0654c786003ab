# SPDX-License-Identifier: Apache-2.0
"""A process that reads for `fuzz.py`, case after case, and is killed when it hangs."""

import json
import os
import resource
import select
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fuzz_changes import TRAP
from fuzz_readers import READERS, Read

SECONDS = 10.0
"""Of the processor's time, or of waiting for what does not come; however busy the machine
is with other work."""
POLL = 0.5
MEMORY = 256 << 20
"""Bytes beside twice the files that reading may take."""
ADDRESSES = 2 << 30
TICKS = os.sysconf("SC_CLK_TCK")
CASES = 200  # of a process: what it has learned by then is forgotten


class Worker:
    """A fork of this process, or the next one."""

    def __init__(self) -> None:
        self._child, self._cases = 0, 0

    def read(
        self, there: Path, scratch: Path, reader: str, size: int
    ) -> dict[str, Any]:
        """
        Let a reader read a folder.

        :param size: bytes of the folder
        :return: the fields of ``Read``, ``seconds``, ``megabytes`` and ``failures``
        """
        if not self._child or self._cases == CASES:
            self.stop()
            self._start()
        self._cases += 1
        request = json.dumps([str(there), str(scratch), reader, 2 * size])
        line = b""
        os.write(self._requests, request.encode() + b"\n")
        watch = _Watch(self._child)
        while not line.endswith(b"\n"):
            if not select.select([self._answers], [], [], POLL)[0]:
                if watch.is_hanging():
                    os.kill(self._child, signal.SIGKILL)
                    return self._lost("hangs", watch)
                continue
            part = os.read(self._answers, 1 << 16)
            if not part:
                return self._lost("", watch)
            line += part
        told: dict[str, Any] = json.loads(line)
        memory = told.pop("memory")
        words = told["error"] + told["said"]
        refused = ("MemoryError", "DefaultCPUAllocator", "a smaller --batch-size")
        failures = ["traceback"] if told["error"] else []
        if memory > 2 * size + MEMORY or any(word in words for word in refused):
            failures.append("memory")
        return told | {
            "seconds": round(watch.seconds(), 3),
            "megabytes": round(memory / 1e6, 1),
            "failures": tuple(failures),
        }

    def stop(self) -> int:
        """End the process; returns how it ended."""
        if not self._child:
            return 0
        os.close(self._requests)
        os.close(self._answers)
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        return status

    def _lost(self, failure: str, watch: "_Watch") -> dict[str, Any]:
        seconds = round(watch.seconds(), 3)
        status = self.stop()
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        failure = failure or f"died of {number}"
        nothing = {"status": 1, "said": "", "error": "", "made": None, "left": ()}
        return nothing | {
            "seconds": seconds,
            "megabytes": 0.0,
            "failures": (failure,),
        }

    def _start(self) -> None:
        theirs, self._requests = os.pipe()
        self._answers, ours = os.pipe()
        self._cases, self._child = 0, os.fork()
        if self._child == 0:
            os.close(self._requests)
            os.close(self._answers)
            _serve(theirs, ours)
        os.close(theirs)
        os.close(ours)


class _Watch:
    """Looks at how long a process has computed, and how long it has waited."""

    def __init__(self, child: int) -> None:
        self._child, self._waited = child, 0.0
        self._before = self._last = self._now()[0]

    def seconds(self) -> float:
        """Of computing and of waiting, since this object was made."""
        return self._now()[0] - self._before + self._waited

    def is_hanging(self) -> bool:
        """Tell, every ``POLL`` seconds, whether it has gone on for too long."""
        now, waits = self._now()
        self._waited += POLL if waits and now == self._last else 0.0
        self._last = now
        return self.seconds() > SECONDS

    def _now(self) -> tuple[float, bool]:
        try:
            told = Path(f"/proc/{self._child}/stat").read_text().rpartition(")")[2]
        except OSError:  # it has died
            return self._last, False
        words = told.split()
        return (int(words[11]) + int(words[12])) / TICKS, words[0] in "SD"


def _serve(requests: int, answers: int) -> None:
    """Read what is asked for until nobody asks any more, and end this process."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        with open(requests) as lines:
            for line in lines:
                there, scratch, reader, allowed = json.loads(line)
                told = _told(Path(there), Path(scratch), reader, allowed)
                content = json.dumps(told).encode() + b"\n"
                while content:
                    content = content[os.write(answers, content) :]
    finally:
        os._exit(0)


def _told(there: Path, scratch: Path, reader: str, allowed: int) -> dict[str, Any]:
    sys.modules.pop(TRAP, None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is counted anew
    before = _memory("VmRSS")
    limit = _memory("VmSize") + allowed + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        read = READERS[reader](there, scratch)
    except BaseException as error:  # of the harness itself, or of a reader
        read = Read(1, "", f"{type(error).__name__}: {error}")
    told = asdict(read) | {"memory": max(0, _memory("VmHWM") - before)}
    return told | {"said": told["said"][-20_000:]}


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise LookupError(name)
