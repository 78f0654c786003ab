# SPDX-License-Identifier: Apache-2.0
"""What a command is where ``torchrun`` starts it many times; it costs nothing elsewhere."""

import time
from typing import TYPE_CHECKING

from nm_permute_plugin.pruning.processes import place, rank, started

if TYPE_CHECKING:
    import torch

BEFORE_OTHERS_SPEAK = 5.0
"""Seconds that a rank holds an error back: where all have the same, the first one says it,
and ``torchrun`` stops the others."""


def own_device(asked: str) -> "torch.device":
    """The device of this process: where GPUs are asked for, one for each on a host."""
    import torch

    device = torch.device(asked)
    if started() == 1 or device.type != "cuda" or device.index is not None:
        return device
    own, there = place(), torch.cuda.device_count()
    if own >= there:
        raise ValueError(
            f"torchrun has started process {own + 1} of this host, which has {there} "
            f"GPUs: give --nproc-per-node {there}, or --device cpu"
        )
    return torch.device("cuda", own)


def refuse_many(command: str | None) -> None:
    """
    Refuse commands that many processes would do many times.

    :raises ValueError: for all commands but ``prune``
    """
    if started() > 1 and command != "prune":
        raise ValueError(
            f"torchrun has started {started()} processes, and `nm-permute {command}` is "
            "done by one: start it without torchrun (`prune` is for many)"
        )


def refuse_dry_run() -> None:
    """
    Refuse to measure a few steps in many processes at once.

    :raises ValueError: if there are many
    """
    if started() > 1:
        raise ValueError(
            "--dry-run measures with one process: start it without torchrun; steps take "
            "about as many times less as there are GPUs"
        )


def hold_back() -> str:
    """Wait before an error is said, where it may be everybody's; its prefix."""
    if rank() == 0:
        return ""
    time.sleep(BEFORE_OTHERS_SPEAK)
    return f"rank {rank()}: "
