# SPDX-License-Identifier: Apache-2.0
"""
cuSPARSELt's plans, made once for each size and kept.

torch makes the descriptors and the plan of a product anew at every call, most of a
millisecond of the CPU's time. A captured graph hides it; tokens that no graph was captured
for, as those of a prompt, would wait for it in every layer.
"""

import ctypes
import logging
import weakref
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.libraries import nvidia_library

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

_FIRST_VERSION = 800
"""0.8.0. The numbers below, and the sizes of structures, are those since then."""

_STRUCTURE = 512  # bytes of each of the library's structures
_ALIGNMENT = 16
_COLUMN_MAJOR, _ROW_MAJOR = 1, 2
_AS_IT_IS, _TRANSPOSED = 0, 1
_DTYPES = {
    torch.float16: 2,
    torch.int8: 3,
    torch.bfloat16: 14,
    torch.float8_e4m3fn: 28,
}
_INTEGER_SUMS, _FLOAT_SUMS = 0, 2
_ALGORITHM, _PARTS, _HOW = 0, 3, 4

_ONE, _ZERO = (ctypes.byref(ctypes.c_float(number)) for number in (1, 0))

PLANS_KEPT = 4096
"""A server sees prompts of many lengths; a plan is some kilobytes."""


class Size(NamedTuple):
    """
    All that a plan depends on.

    :param algorithm: of the library, ``parts`` of the channels, and ``how`` these are added
        up; -1 leaves that to the library
    """

    device: int
    rows: int
    channels: int
    tokens: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    algorithm: int
    parts: int
    how: int


@lru_cache(maxsize=PLANS_KEPT)
def plan_of(size: Size) -> "Plan | None":
    """The plan of a size; None where torch's library is not known, or refuses it."""
    version = torch.backends.cusparselt.version() or 0
    if version < _FIRST_VERSION or _library() is None:
        return None
    try:
        return Plan(size)
    except RuntimeError as error:
        logger.warning("no plan is kept for %s: %s", size, error)
        return None


def multiply(plan: "Plan", form: Tensor, x: Tensor) -> Tensor:
    """
    ``x @ weight.T``: [tokens, rows].

    :param form: the weight [rows, channels] as ``torch._cslt_compress`` stores it
    :param x: [tokens, channels], contiguous, as many tokens as the alignment asks for
    :raises RuntimeError: if the library refuses the product
    """
    size = plan.size
    out = x.new_empty((size.tokens, size.rows), dtype=size.out_dtype)
    space = x.new_empty(plan.workspace, dtype=torch.uint8)
    stream = ctypes.c_void_p(torch.cuda.current_stream(size.device).cuda_stream)
    to = _pointer(out)
    tensors = (_ONE, _pointer(form), _pointer(x), _ZERO, to, to, _pointer(space))
    _call("Matmul", plan.handle, plan.at, *tensors, ctypes.byref(stream), 1)
    return out


class _Structure(ctypes.Structure):
    """One of the library's, at an address that it likes."""

    _fields_ = [("data", ctypes.c_uint8 * (_STRUCTURE + 64))]

    @property
    def at(self) -> ctypes.c_void_p:
        address = ctypes.addressof(self)
        return ctypes.c_void_p(-(-address // 64) * 64)


class Plan:
    """
    A plan with the structures that it points to; the library's part of it ends with it.

    :ivar handle: the library's state on its device
    :ivar at: its address
    :ivar workspace: bytes that a product needs beside its output
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        self.handle = handle = _handle(size.device)
        self._kept = [_Structure() for _ in range(6)]
        weight, tokens, out, product, algorithm, plan = (s.at for s in self._kept)
        dtype, out_dtype = _DTYPES[size.dtype], _DTYPES[size.out_dtype]
        shape = (size.rows, size.channels, size.channels)
        _call(
            "StructuredDescriptorInit",
            *(handle, weight, *map(ctypes.c_int64, shape)),
            *(_ALIGNMENT, dtype, _ROW_MAJOR, 0),
        )
        shape = (size.tokens, size.channels, size.channels)
        _call(
            "DenseDescriptorInit",
            *(handle, tokens, *map(ctypes.c_int64, shape)),
            *(_ALIGNMENT, dtype, _ROW_MAJOR),
        )
        shape = (size.rows, size.tokens, size.rows)
        _call(
            "DenseDescriptorInit",
            *(handle, out, *map(ctypes.c_int64, shape)),
            *(_ALIGNMENT, out_dtype, _COLUMN_MAJOR),
        )
        _call(
            "MatmulDescriptorInit",
            *(handle, product, _AS_IT_IS, _TRANSPOSED, weight, tokens, out, out),
            _INTEGER_SUMS if size.dtype == torch.int8 else _FLOAT_SUMS,
        )
        _call("MatmulAlgSelectionInit", handle, algorithm, product, 0)
        _set(handle, algorithm, _ALGORITHM, size.algorithm)
        if size.parts != 1:
            _set(handle, algorithm, _PARTS, size.parts)
        if size.how >= 0:
            _set(handle, algorithm, _HOW, size.how)
        _call("MatmulPlanInit", handle, plan, product, algorithm)
        needed = ctypes.c_size_t()
        _call("MatmulGetWorkspace", handle, plan, ctypes.byref(needed))
        self.at, self.workspace = plan, needed.value
        weakref.finalize(self, _end, self._kept, plan).atexit = False


def _end(kept: list[_Structure], plan: ctypes.c_void_p) -> None:
    """Free what the library holds for a plan, whose structures are kept until then."""
    _call("MatmulPlanDestroy", plan)


def _set(
    handle: ctypes.c_void_p, algorithm: ctypes.c_void_p, attribute: int, value: int
) -> None:
    data = ctypes.c_int32(value)
    size = ctypes.c_size_t(ctypes.sizeof(data))
    of = (handle, algorithm, attribute)
    _call("MatmulAlgSetAttribute", *of, ctypes.byref(data), size)


@cache
def _handle(device: int) -> ctypes.c_void_p:
    """The library's state on a device, kept as long as the process."""
    _HANDLES.append(_Structure())
    handle = _HANDLES[-1].at
    with torch.cuda.device(device):
        _call("Init", handle)
    return handle


_HANDLES: list[_Structure] = []


def _library() -> ctypes.CDLL | None:
    return nvidia_library("libcusparseLt.so.0")


def _call(function: str, *arguments: object) -> None:
    code = getattr(_library(), f"cusparseLt{function}")(*arguments)
    if code:
        raise RuntimeError(f"cusparseLt{function} answered {code}")


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
