# SPDX-License-Identifier: Apache-2.0
"""
Tests in a process of its own whether a kernel crashes, since a crash ends its process.

cuSPARSELt's search crashes for some shapes ("illegal instruction", version 0.8). An
illegal access to a card's memory ends what a process can do with it, a server's too.
"""

import signal
import subprocess
import sys

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernel_table import BUCKETS
from nm_permute_plugin.serving.ops import KERNELS
from nm_permute_plugin.serving.tune import random_tokens

TIMEOUT = 180
"""A process that takes longer than this many seconds counts as crashed."""


def crash_reason(name: str, weight: Tensor) -> str | None:
    """
    Run a kernel at every number of tokens, in a process; return how that crashed, or None.

    :param weight: the test takes its shape, dtype and device, not its values
    """
    rows, channels = weight.shape
    dtype = str(weight.dtype).removeprefix("torch.")
    words = (name, rows, channels, dtype, weight.device)
    return crash_of("nm_permute_plugin.serving.probe", *words)


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


def main(name: str, rows: str, channels: str, dtype: str, device: str) -> None:
    """Run every candidate of a kernel; settings that are refused are no crash."""
    torch.cuda.set_device(device)
    values = torch.ones(int(rows), int(channels), device=device)
    values[:, 2::4] = values[:, 3::4] = 0
    weight = values.to(getattr(torch, dtype))
    kernel = KERNELS[name]
    packed = kernel.prepare(weight)
    for tokens in BUCKETS:
        x = random_tokens(weight, tokens)
        for settings in kernel.candidates(packed, x, len(weight)):
            try:
                kernel.run(packed, x, len(weight), settings)
            except RuntimeError as error:
                print(f"{name}{settings}, {tokens} tokens: {error}")
            torch.cuda.synchronize()  # raises if the context is lost


if __name__ == "__main__":
    main(*sys.argv[1:])
