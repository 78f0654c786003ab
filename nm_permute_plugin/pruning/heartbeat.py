# SPDX-License-Identifier: Apache-2.0
"""
Ranks that hear nothing of another one end, instead of waiting for it for ever.

A process that dies ends the others by ``torchrun``; a host that vanishes, or a process that
stands still, does not. So every rank writes into the store of the process group that it is
alive, and looks at what the others have written.
"""

import atexit
import os
import sys
import threading
import time
from typing import Any

from torch import distributed

BETWEEN = 5.0
"""Seconds from one sign of life to the next."""

SILENCE = 45.0
"""Seconds without a sign after which a rank is given up."""

_KEY, _END = "nm_permute_alive", "end"


class Heartbeat:
    """
    Signs of life of one rank, given and watched in a thread of their own.

    :param number: of this rank
    :param count: of all ranks
    """

    def __init__(self, number: int, count: int) -> None:
        # Of its own: an answer that is waited for must not hold up the others.
        store: Any = distributed.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._number, self._others = number, [n for n in range(count) if n != number]
        self._beats = 0
        self._stopped = threading.Event()
        self._beat()
        self._heard = {n: ("", time.monotonic()) for n in self._others}
        threading.Thread(target=self._run, daemon=True).start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Tell the others that this rank ends, and that nothing is wrong."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        try:
            self._store.set(f"{_KEY}{self._number}", _END)
        except Exception:  # the store may have ended before
            return

    def _run(self) -> None:
        while not self._stopped.wait(BETWEEN):
            try:
                self._beat()
                silent = [n for n in self._others if self._is_silent(n)]
            except Exception as error:
                if not self._stopped.is_set():
                    _give_up(f"the process group's store does not answer ({error})")
                return
            if silent and not self._stopped.is_set():
                _give_up(
                    f"rank {silent[0]} has given no sign of life for {SILENCE:.0f} s"
                )

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"{_KEY}{self._number}", str(self._beats))

    def _is_silent(self, number: int) -> bool:
        key = f"{_KEY}{number}"
        value = self._store.get(key).decode() if self._store.check([key]) else ""
        before, since = self._heard[number]
        if value in (before, "") and value != _END:
            return time.monotonic() - since > SILENCE
        self._heard[number] = value, time.monotonic()
        return False


def _give_up(reason: str) -> None:
    """End this process at once: its main thread waits for what does not come."""
    print(
        f"error: {reason}: its host or the network may be gone. The run ends; where its "
        "state is kept, the same command goes on",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
