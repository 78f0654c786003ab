# SPDX-License-Identifier: Apache-2.0
"""
Runs the CUDA kernels of experts on a CPU, from their own source, compiled by ``g++``.

What is PTX, the loads and the tensor cores, is C++ in ``cuda_on_cpu.h`` instead, which was
written from the PTX manual. All else is the kernel as it is, thread by thread.
"""

import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.expert_product import KINDS, ProductShape
from nm_permute_plugin.serving.kernels.mma_sp import source_of

IN_PTX = "load_once load_cached load_fresh mma to_out fetch await from_half to_halves"
"""The functions that are written in PTX, and in C++ in ``cuda_on_cpu.h``."""

Launch = Callable[..., None]


def function_on_cpu(
    folder: Path, name: str, x: Tensor, shape: ProductShape | None
) -> Launch:
    """
    Return a kernel that runs on a CPU, with the arguments of ``nvidia.Function``.

    :param folder: the compiled ones are kept there
    """
    file, macros = "experts.cu", {"KIND": KINDS[x.dtype]}
    if shape is None:
        few = ("TILES", "WARPS_N", "WARPS_K", "DEPTH", "PITCH")
        macros |= dict.fromkeys(few, 1)
    else:
        file, macros = "experts24.cu", shape.macros(KINDS[x.dtype])
    launch = compiled(folder, file, name, tuple(macros.items()))

    def call(
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Tensor | int],
        overlaps: bool = False,
    ) -> None:
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        assert all(each.is_contiguous() for each in tensors)
        values = [
            ctypes.c_void_p(each.data_ptr()) if isinstance(each, Tensor) else each
            for each in arguments
        ]
        launch(*grid, threads, *values)

    return call


@cache
def compiled(
    folder: Path, file: str, name: str, macros: tuple[tuple[str, int], ...]
) -> Launch:
    """Compile a kernel, and what launches it."""
    source = on_cpu(source_of(file)) + launcher(source_of(file), name)
    header = Path(__file__).with_name("cuda_on_cpu.h")
    key = sha256(repr((source, macros)).encode()).hexdigest()[:16]
    text, library = folder / f"{key}.cpp", folder / f"{key}.so"
    text.write_text(f'#include "{header}"\n{source}')
    options = [f"-D{macro}={value}" for macro, value in macros]
    command = ["g++", "-O1", "-std=c++17", "-w", "-shared", "-fPIC", *options]
    done = subprocess.run(
        [*command, str(text), "-o", str(library)], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return getattr(ctypes.CDLL(str(library)), f"launch_{name}")


def on_cpu(source: str) -> str:
    """Leave out what is written in PTX, and make the shared memory plain."""
    for name in IN_PTX.split():
        source = re.sub(
            rf"(template <int HALF>\n)?__device__ __forceinline__ [\w ]+ {name}\([^{{]*"
            r"\{\n.*?\n\}\n",
            "",
            source,
            flags=re.DOTALL,
        )
    source = source.replace("extern __shared__", "extern")
    return source.replace("__shared__", "static")


def launcher(source: str, name: str) -> str:
    """Write the function that runs all blocks of a kernel."""
    found = re.search(rf"\b{name}\(([^{{]*)\) \{{", re.sub(r"//[^\n]*", "", source))
    assert found
    arguments = found[1].replace("__restrict__", "")
    names = ", ".join(re.findall(r"(\w+)(?:,|$)", arguments.strip()))
    return (
        f'\nextern "C" void launch_{name}(int grid_x, int grid_y, int threads, '
        f"{arguments}) {{\n"
        f"  launch(grid_x, grid_y, threads, [&] {{ {name}({names}); }});\n}}\n"
    )


def is_available() -> bool:
    """Whether there is a compiler."""
    try:
        subprocess.run(["g++", "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return not torch.version.hip
