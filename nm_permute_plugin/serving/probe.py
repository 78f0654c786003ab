# SPDX-License-Identifier: Apache-2.0
"""
Tells in a process of its own whether the kernel of routed experts crashes.

An illegal access to a card's memory ends what a process can do with it, a server's too.
"""

import signal
import subprocess
import sys

TIMEOUT = 180
"""A process that takes longer than this many seconds counts as crashed."""


def crash_of(module: str, *words: object) -> str | None:
    """
    Run a module in a process of its own; return how that crashed, or None.

    :param words: its arguments
    """
    command = [sys.executable, "-m", module, *map(str, words)]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return f"a process that tried it had not ended after {TIMEOUT} s"
    if not run.returncode:
        return None
    ended = f"exit status {run.returncode}"
    if run.returncode < 0:
        ended = f"signal {signal.Signals(-run.returncode).name}"
    last = run.stderr.strip().splitlines()[-1:]
    return ": ".join([f"a process that tried it ended with {ended}", *last])
