# SPDX-License-Identifier: Apache-2.0
"""
NVIDIA's libraries that torch brings along, and CUDA kernels compiled with them.

NVRTC compiles CUDA source at run time, so that users need no CUDA toolkit.
"""

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PACKAGES = Path(torch.__file__).parents[1] / "nvidia"
"""The folder where torch's CUDA wheels install NVIDIA's libraries."""


_RESERVED = 1024
"""CUDA keeps so many bytes of a multiprocessor's shared memory for each block."""


class Card(NamedTuple):
    """
    What a kernel must know of a card.

    :param capability: the compute capability, such as (9, 0)
    :param shared_bytes: the shared memory that one block may have, in bytes
    """

    capability: tuple[int, int]
    shared_bytes: int


def card_of(device: torch.device) -> Card:
    """Return the card that is a CUDA device."""
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_multiprocessor - _RESERVED
    return Card((found.major, found.minor), shared)


@cache
def nvidia_library(name: str) -> ctypes.CDLL | None:
    """
    Load the library with this file name; None if there is none.

    A library that torch has already loaded is found by its name alone.
    """
    for candidate in (name, *PACKAGES.glob(f"*/lib/{name}")):
        try:
            return ctypes.CDLL(str(candidate))
        except OSError:
            continue
    return None


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    """Load NVIDIA's run-time compiler, the one that torch brings along."""
    name = f"libnvrtc.so.{(torch.version.cuda or '*').partition('.')[0]}"
    for builtins in PACKAGES.glob("*/lib/libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # the compiler looks for it by name alone
    library = nvidia_library(name)
    if library is None:
        raise RuntimeError(f"{name} not found; it comes with torch's CUDA wheels")
    return library


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"NVIDIA's driver is not installed: {error}") from None


@lru_cache(maxsize=1)
def compiler_version() -> tuple[int, int]:
    """
    Return the version of the run-time compiler.

    :raises RuntimeError: if there is none
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_source(source: str, architecture: str, macros: dict[str, int]) -> bytes:
    """
    Compile CUDA C++ source to machine code.

    :param architecture: the target, such as ``sm_90``
    :param macros: preprocessor definitions by name
    :raises RuntimeError: if it does not compile; the message holds the compiler's log
    """
    library = _nvrtc()
    options = [f"--gpu-architecture={architecture}", "-std=c++17"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    encoded = (ctypes.c_char_p * len(options))(*(text.encode() for text in options))
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"sparse24.cu", 0, None, None
    )
    if created:
        raise RuntimeError(f"nvrtcCreateProgram failed with code {created}")
    try:
        if library.nvrtcCompileProgram(program, len(options), encoded):
            log = _read(library, program, "ProgramLog").decode(errors="replace")
            raise RuntimeError(f"compiling with {' '.join(options)} failed:\n{log}")
        return _read(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


_OVERLAPS = 6
"""CUDA's number for CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""


class _LaunchAttribute(ctypes.Structure):
    """CUDA's ``CUlaunchAttribute``, whose value is a union of 64 bytes."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_uint),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _LaunchConfig(ctypes.Structure):
    """CUDA's ``CUlaunchConfig``."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z")),
        *((name, ctypes.c_uint) for name in ("block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Function:
    """
    A kernel loaded from machine code, on the device that is current at that time.

    :param name: the kernel's name in the source
    :param shared_bytes: dynamic shared memory of each block, in bytes
    :raises RuntimeError: if the driver cannot load it
    """

    def __init__(self, code: bytes, name: str, shared_bytes: int = 0) -> None:
        self._shared_bytes = shared_bytes
        torch.cuda.current_stream()  # makes sure that there is a context
        self._module = ctypes.c_void_p()
        self._function = ctypes.c_void_p()
        module, function = ctypes.byref(self._module), ctypes.byref(self._function)
        _call("cuModuleLoadData", module, code)
        _call("cuModuleGetFunction", function, self._module, name.encode())
        max_dynamic_shared = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call("cuFuncSetAttribute", self._function, max_dynamic_shared, shared_bytes)

    def __call__(
        self,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Tensor | int],
        overlaps: bool = False,
    ) -> None:
        """
        Launch on the current stream; tensors pass as pointers, numbers as C ``int``.

        :param grid: blocks in x and y
        :param threads: threads of each block
        :param overlaps: its blocks may start before the kernel before has ended, as soon
            as that one says so; the kernel itself waits for what it reads of it

        :raises RuntimeError: if the driver refuses the launch
        """
        values = [
            ctypes.c_int(argument)
            if isinstance(argument, int)
            else ctypes.c_void_p(argument.data_ptr())
            for argument in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.addressof(value) for value in values)
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        sizes = (*grid, 1, threads, 1, 1, self._shared_bytes)
        if not overlaps:
            _call("cuLaunchKernel", self._function, *sizes, stream, pointers, None)
            return
        attribute = _LaunchAttribute(id=_OVERLAPS, value=1)
        config = _LaunchConfig(*sizes, stream, ctypes.pointer(attribute), 1)
        launched = (ctypes.byref(config), self._function, pointers, None)
        _call("cuLaunchKernelEx", *launched)


def _call(function: str, *arguments: object) -> None:
    if code := getattr(_driver(), function)(*arguments):
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown"
        raise RuntimeError(f"the CUDA driver answered {code}: {reason}")
