# SPDX-License-Identifier: Apache-2.0
"""
Compute in the dtype that this CPU is fast in; checkpoints stay in their own.

A CPU without instructions for bfloat16 multiplies it seven times slower than float32.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain

import psutil
import torch
from loguru import logger
from torch import Tensor, nn

SLOW = 1.5
"""A 16-bit product is left to float32 where it takes more than so many times as long."""

ROOM = 1.5
"""Free memory that a copy of the weights in float32 needs, relative to its size."""


@contextmanager
def computing_fast(model: nn.Module) -> Iterator[None]:
    """
    ``to_fast_dtype`` while the context lasts; after it every weight has its own dtype.

    Every 16-bit number is a float32 as well: weights that were only moved, or zeroed, come
    back bit for bit.
    """
    dtypes = to_fast_dtype(model)
    try:
        yield
    finally:
        for name, tensor in _tensors(model) if dtypes else ():
            if name in dtypes:
                tensor.data = tensor.data.to(dtypes[name])


def to_fast_dtype(model: nn.Module) -> dict[str, torch.dtype]:
    """
    Hold the 16-bit weights of a model on a CPU in float32, if this CPU multiplies those
    faster and has the memory.

    :return: the dtypes that they had, by name
    """
    if any(map(hands_out_copies, model.modules())):
        return {}  # offloaded: to look at its weights would fetch them
    slow = {name: t for name, t in _tensors(model) if _is_slow(t)}
    size = sum(4 * tensor.numel() for tensor in slow.values())
    if not slow or ROOM * size > psutil.virtual_memory().available:
        return {}
    dtypes = {name: tensor.dtype for name, tensor in slow.items()}
    logger.info(
        f"Computing in float32: this CPU is slower in {next(iter(dtypes.values()))}"
    )
    for tensor in slow.values():
        tensor.data = tensor.data.float()
    return dtypes


def hands_out_copies(module: nn.Module) -> bool:
    """Whether a module is offloaded, so that each look at its weights is a copy."""
    stored = module._parameters
    name = None if type(stored) is dict else next(iter(stored), None)
    return name is not None and stored[name] is not stored[name]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _is_slow(tensor: Tensor) -> bool:
    is_short = tensor.dtype in (torch.bfloat16, torch.float16)
    return (
        is_short and tensor.device.type == "cpu" and _times_as_long(tensor.dtype) > SLOW
    )


@cache
def _times_as_long(dtype: torch.dtype) -> float:
    """How many times as long this CPU takes for a product as in float32."""
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The seconds of a small product, the fastest of some."""
    x, weight = (torch.ones(size, 256, dtype=dtype) for size in (128, 256))
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        taken.append(time.perf_counter() - started)
    return min(taken)
