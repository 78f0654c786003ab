# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's libraries, those that torch brings along."""

import ctypes
from functools import cache
from pathlib import Path

import torch

PACKAGES = Path(torch.__file__).parents[1] / "nvidia"
"""Where torch's CUDA wheels put them."""


@cache
def nvidia_library(name: str) -> ctypes.CDLL | None:
    """
    The library of a file name, loaded; None where there is none.

    One that torch has loaded is found by its name alone.
    """
    for candidate in (name, *PACKAGES.glob(f"*/lib/{name}")):
        try:
            return ctypes.CDLL(str(candidate))
        except OSError:
            continue
    return None
