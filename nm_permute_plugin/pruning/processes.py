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


def refuse_strange() -> None:
    """
    See that processes that are told of each other can find each other.

    :raises ValueError: if ``torchrun`` has not started them
    """
    wanted = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if started() > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE says that there are {started()} processes, but {missing[0]} is "
            "not set: start them by torchrun, or unset WORLD_SIZE to prune without "
            "torchrun"
        )


def _number(name: str, default: int) -> int:
    given = os.environ.get(name, "")
    return int(given) if given.isdecimal() else default
