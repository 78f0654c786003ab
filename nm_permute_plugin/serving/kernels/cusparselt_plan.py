# SPDX-License-Identifier: Apache-2.0
"""
cuSPARSELt's plans, made once for each size and kept.

torch makes the descriptors and the plan of a product anew at every call, which takes the
CPU most of a millisecond. CUDA graphs hide that; numbers of tokens without a captured
graph, such as those of prompts, would wait for it in every layer.
"""

import ctypes
import logging
import weakref
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.nvidia import nvidia_library

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

_FILE = "libcusparseLt.so.0"

_VERSIONS = (800, 801)
"""The constants below hold for cuSPARSELt 0.8.0 and 0.8.1, whose headers are alike
(``version()`` is 800 for 0.8.0). With any other version torch makes the plans."""

_STRUCTURE_BYTES = 512
"""The library's structures have this size each; a trial tells if they are larger."""

_GUARD, _PATTERN = 1 << 16, b"\xa5"
"""Behind the structures of the trial lie so many bytes of this value."""

_ALIGNMENT = 16
"""We promise the library that matrices start at a multiple of this many bytes."""

_COLUMN_MAJOR, _ROW_MAJOR = 1, 2
_AS_IT_IS, _TRANSPOSED = 0, 1
_DTYPES = {torch.float16: 2, torch.int8: 3, torch.bfloat16: 14, torch.float8_e4m3fn: 28}
_INTEGER_SUMS, _FLOAT_SUMS = 0, 2
_ALGORITHM, _SPLIT_K, _SPLIT_K_MODE = 0, 3, 4

_ONE, _ZERO = (ctypes.byref(ctypes.c_float(number)) for number in (1, 0))

PLANS_KEPT = 4096
"""So many plans are kept, of a few kilobytes each: prompts have many lengths."""


class ProductSize(NamedTuple):
    """
    Everything that a plan depends on.

    :param algorithm: the library's algorithm id
    :param split_k: how many slices the channels are split into; 1 for no split
    :param split_k_mode: how the slices' sums are added up; -1 lets the library choose
    """

    device: int
    rows: int
    channels: int
    tokens: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    algorithm: int
    split_k: int
    split_k_mode: int


_TRIAL = ProductSize(0, 128, 128, 128, torch.bfloat16, torch.bfloat16, 0, 1, -1)
"""Every card with sparse tensor cores has a plan for it."""


@lru_cache(maxsize=PLANS_KEPT)
def plan_of(size: ProductSize) -> "Plan | None":
    """Return the plan of a size; None if torch has to make it, at every call."""
    if not _is_sound(size.device, torch.backends.cusparselt.version() or 0):
        return None
    try:
        return Plan(size)
    except RuntimeError as error:
        logger.warning("no cuSPARSELt plan is kept for %s: %s", size, error)
        return None


@cache
def _is_sound(device: int, version: int) -> bool:
    """Whether our constants hold for torch's version; logs once where they may not."""
    if fault := _fault(device, version):
        logger.warning(
            "torch makes cuSPARSELt's plans at every call, which takes longer without "
            "CUDA graphs: %s",
            fault,
        )
        return False
    return True


def _fault(device: int, version: int) -> str | None:
    """Return why we make no plans; None if a trial shows that we can."""
    if version not in _VERSIONS:
        tested = " and ".join(map(_words, _VERSIONS))
        return f"its version {_words(version)} is not a tested one, {tested} are"
    if _library() is None:
        return f"{_FILE} is not found"
    try:
        if (found := _found_version()) != version:
            return f"{_FILE} is version {_words(found)}, torch's is {_words(version)}"
        trial = Plan(_TRIAL._replace(device=device), guard=_GUARD)
    except (RuntimeError, AttributeError) as error:  # answers; functions that are gone
        return str(error)
    if trial.overflows or _handle(device).overflows:
        return f"its structures are larger than {_STRUCTURE_BYTES} bytes"
    return None


def _found_version() -> int:
    """Return the version of the library that we call, as ``version()`` counts."""
    parts = [ctypes.c_int() for _ in range(3)]
    for which, part in enumerate(parts):
        _call("GetProperty", which, ctypes.byref(part))
    major, minor, patch = (part.value for part in parts)
    return 1000 * major + 100 * minor + patch


def _words(version: int) -> str:
    """
    Write a version as NVIDIA does.

    >>> _words(801), _words(1000)
    ('0.8.1', '0.10.0')
    """
    return f"0.{version // 100}.{version % 100}"


def multiply(plan: "Plan", packed: Tensor, x: Tensor) -> Tensor:
    """
    Compute ``x @ weight.T``: [tokens, rows].

    :param packed: the weight [rows, channels] as ``torch._cslt_compress`` stores it
    :param x: [tokens, channels], contiguous, padded to the library's alignment
    :raises RuntimeError: if the library refuses the product
    """
    size = plan.size
    out = x.new_empty((size.tokens, size.rows), dtype=size.out_dtype)
    space = x.new_empty(plan.workspace, dtype=torch.uint8)
    stream = ctypes.c_void_p(torch.cuda.current_stream(size.device).cuda_stream)
    to = _pointer(out)
    tensors = (_ONE, _pointer(packed), _pointer(x), _ZERO, to, to, _pointer(space))
    _call("Matmul", plan.handle, plan.address, *tensors, ctypes.byref(stream), 1)
    return out


class _Structure:
    """
    Memory for one of the library's structures, aligned to 64 bytes.

    :param guard: so many bytes behind it tell whether the library wrote past its end
    """

    def __init__(self, guard: int = 0) -> None:
        self._memory = (ctypes.c_uint8 * (_STRUCTURE_BYTES + 64 + guard))()
        start = -(-ctypes.addressof(self._memory) // 64) * 64
        self.address = ctypes.c_void_p(start)
        self._end, self._guard = start + _STRUCTURE_BYTES, guard
        ctypes.memset(self._end, ord(_PATTERN), guard)

    @property
    def overflows(self) -> bool:
        """Whether the library's structure is larger than ours."""
        return ctypes.string_at(self._end, self._guard) != _PATTERN * self._guard


class Plan:
    """
    The library's plan and the structures it points to; freed when this object is.

    :ivar handle: the address of the library's state on the device
    :ivar address: the address of the plan
    :ivar workspace: scratch memory that a product needs, in bytes
    """

    def __init__(self, size: ProductSize, guard: int = 0) -> None:
        self.size = size
        self.handle = handle = _handle(size.device).address
        self._kept = [_Structure(guard) for _ in range(6)]
        weight, tokens, out, product, algorithm, plan = (s.address for s in self._kept)
        dtype, out_dtype = _DTYPES[size.dtype], _DTYPES[size.out_dtype]
        shape = map(ctypes.c_int64, (size.rows, size.channels, size.channels))
        layout = (_ALIGNMENT, dtype, _ROW_MAJOR)
        _call("StructuredDescriptorInit", handle, weight, *shape, *layout, 0)
        shape = map(ctypes.c_int64, (size.tokens, size.channels, size.channels))
        _call("DenseDescriptorInit", handle, tokens, *shape, *layout)
        shape = map(ctypes.c_int64, (size.rows, size.tokens, size.rows))
        layout = (_ALIGNMENT, out_dtype, _COLUMN_MAJOR)
        _call("DenseDescriptorInit", handle, out, *shape, *layout)
        operands = (_AS_IT_IS, _TRANSPOSED, weight, tokens, out, out)
        sums = _INTEGER_SUMS if size.dtype == torch.int8 else _FLOAT_SUMS
        _call("MatmulDescriptorInit", handle, product, *operands, sums)
        _call("MatmulAlgSelectionInit", handle, algorithm, product, 0)
        _set(handle, algorithm, _ALGORITHM, size.algorithm)
        if size.split_k != 1:
            _set(handle, algorithm, _SPLIT_K, size.split_k)
        if size.split_k_mode >= 0:
            _set(handle, algorithm, _SPLIT_K_MODE, size.split_k_mode)
        _call("MatmulPlanInit", handle, plan, product, algorithm)
        needed = ctypes.c_size_t()
        _call("MatmulGetWorkspace", handle, plan, ctypes.byref(needed))
        self.address, self.workspace = plan, needed.value
        weakref.finalize(self, _end, self._kept, plan).atexit = False

    @property
    def overflows(self) -> bool:
        """Whether one of the library's structures is larger than ours."""
        return any(structure.overflows for structure in self._kept)


def _end(kept: list[_Structure], plan: ctypes.c_void_p) -> None:
    """Free what the library holds for a plan; its structures live until then."""
    _call("MatmulPlanDestroy", plan)


def _set(
    handle: ctypes.c_void_p, algorithm: ctypes.c_void_p, attribute: int, value: int
) -> None:
    data = ctypes.c_int32(value)
    size = ctypes.c_size_t(ctypes.sizeof(data))
    of = (handle, algorithm, attribute)
    _call("MatmulAlgSetAttribute", *of, ctypes.byref(data), size)


@cache
def _handle(device: int) -> _Structure:
    """Return the library's state on a device, which the cache keeps for the process."""
    handle = _Structure(_GUARD)
    with torch.cuda.device(device):
        _call("Init", handle.address)
    return handle


def _library() -> ctypes.CDLL | None:
    return nvidia_library(_FILE)


def _call(function: str, *arguments: object) -> None:
    code = getattr(_library(), f"cusparseLt{function}")(*arguments)
    if code:
        raise RuntimeError(f"cusparseLt{function} answered {code}")


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
