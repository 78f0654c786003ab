# SPDX-License-Identifier: Apache-2.0
"""What ``torchrun`` tells the processes that it starts; read without PyTorch."""

import os


def started() -> int:
    """How many processes there are; 1 without ``torchrun``."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """The number of this process among all."""
    return _number("RANK", 0) if started() > 1 else 0


def place() -> int:
    """The number of this process among those of its host."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    given = os.environ.get(name, "")
    return int(given) if given.isdecimal() else default
