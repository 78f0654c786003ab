# SPDX-License-Identifier: Apache-2.0
"""
Tells what the sparse kernels do on this machine's card: refused, wrong, or how fast.

What it writes is a Markdown text to paste into a report. It needs no checkpoint.
"""

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor

from nm_permute_plugin.checkpoint import codec
from nm_permute_plugin.serving.kernels import scaling
from nm_permute_plugin.serving.kernels.kernel import DTYPES_8, DTYPES_16, Kernel
from nm_permute_plugin.serving.kernels.nvidia import card_of
from nm_permute_plugin.serving.kernels.scaling import scaled
from nm_permute_plugin.serving.measuring import crash_reason
from nm_permute_plugin.serving.ops import KERNELS
from nm_permute_plugin.serving.tune import (
    TOLERANCE,
    cold_copies,
    error_of,
    microseconds,
    random_tokens,
    random_weight,
    tolerance_of,
)

SHAPES = ((4096, 4096), (4096, 14336))
"""Rows and channels of the weights: those of LLaMA-3-8B's ``o_proj`` and ``down_proj``."""

TOKENS = (1, 16, 64, 1024)

_PROBES = 4
"""So many kernels are tried at once, in a process each."""

_LONGEST = 200
"""Characters of a reason."""

Calls = Sequence[Callable[[], Tensor]]


class Result(NamedTuple):
    """
    What one kernel does with one weight.

    :param kernel: its name
    :param weight: dtype and shape in words
    :param times: microseconds by number of tokens, of the fastest settings
    :param error: the largest error as a share of the largest output of float64
    :param notes: what was refused, failed or wrong
    """

    kernel: str
    weight: str
    times: dict[int, float]
    error: float
    notes: list[str]


def check_card(
    kernels: Mapping[str, Kernel] = KERNELS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    device: str = "cuda",
    time: Callable[[Calls], float] = microseconds,
    probe: Callable[[str, Tensor], str | None] = crash_reason,
) -> str:
    """
    Run every kernel on random weights of every dtype, and write what came out.

    :param kernels: by name; one of them is ``dense``
    :param shapes: rows and channels of the weights
    :param time: returns the microseconds of a call
    :param probe: returns how a kernel crashes in a process of its own, or None
    :raises ValueError: without a CUDA device
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--check runs the sparse kernels on a CUDA device, and torch "
            f"{torch.__version__} finds none here. Run it on a machine with a GPU."
        )
    weights = [
        random_weight(shape, dtype, device)
        for dtype in DTYPES_16 + DTYPES_8
        for shape in shapes
    ]
    cases = [(name, weight) for weight in weights for name in kernels]
    with ThreadPoolExecutor(_PROBES) as pool:
        reasons = pool.map(
            lambda case: _reason(kernels[case[0]], case[1], probe), cases
        )
        results = [
            _check(kernels[name], weight, reason, time)
            for (name, weight), reason in zip(cases, list(reasons), strict=True)
        ]
    facts = _facts(torch.device(device))
    return "\n".join([*facts, _scaling(device), "", *_table(results)])


def _reason(
    kernel: Kernel, weight: Tensor, probe: Callable[[str, Tensor], str | None]
) -> str | None:
    """Return why a kernel must not run in this process, or None."""
    if reason := kernel.unsupported(weight):
        return f"refused: {reason}"
    return None if kernel.name == "dense" else probe(kernel.name, weight)


def _check(
    kernel: Kernel, weight: Tensor, reason: str | None, time: Callable[[Calls], float]
) -> Result:
    """Time a kernel that may run, and compare it with float64."""
    dtype = str(weight.dtype).removeprefix("torch.")
    words = f"{dtype} {weight.shape[0]} x {weight.shape[1]}"
    result = Result(kernel.name, words, {}, 0.0, [reason] if reason else [])
    if reason:
        return result
    largest = 0.0
    try:
        packed = kernel.prepare(weight)
        back = kernel.unpack(packed, (weight.shape[0], weight.shape[1]), weight.dtype)
        if not torch.equal(back.float(), weight.float()):
            result.notes.append("WRONG: the packed weight comes back changed")
        copies = cold_copies(packed)
        for tokens in TOKENS:
            x = random_tokens(weight, tokens)
            expected = x[:64].double() @ weight.double().t()
            for settings in kernel.candidates(packed, x, len(weight)):
                calls = [
                    partial(kernel.run, c, x, len(weight), settings) for c in copies
                ]
                try:
                    wrong = error_of(calls[0](), expected.float())
                    largest = max(largest, wrong)
                    if not wrong <= tolerance_of(x.dtype):
                        raise RuntimeError(f"WRONG: off by {wrong:.3g}")
                    taken = time(calls)
                except RuntimeError as error:
                    result.notes.append(f"{settings}, {tokens} tokens: {error}")
                    continue
                best = result.times.get(tokens, taken)
                result.times[tokens] = min(best, taken)
    except RuntimeError as error:
        result.notes.append(str(error))
    return result._replace(error=largest)


def _table(results: list[Result]) -> list[str]:
    """Write a row for each result: microseconds, and how much faster than dense."""
    head = ["weight", "kernel", *(f"{n} tokens" for n in TOKENS), "off by", "notes"]
    lines = [_row(head), _row(["---"] * len(head))]
    dense = {r.weight: r.times for r in results if r.kernel == "dense"}
    for result in results:
        cells = []
        for tokens in TOKENS:
            taken = result.times.get(tokens)
            cell = "" if taken is None else f"{taken:.1f}"
            beside = dense.get(result.weight, {}).get(tokens)
            if taken and beside and result.kernel != "dense":
                cell += f" ({beside / taken:.2f}x)"
            cells.append(cell)
        off = f"{result.error:.4f}" if result.times else ""
        notes = _shortened(result.notes)
        lines.append(_row([result.weight, result.kernel, *cells, off, notes]))
    return [
        *lines,
        "",
        "Microseconds of a product; in brackets, times as fast as dense.",
    ]


def _shortened(notes: list[str]) -> str:
    """Write the first reason on one line, and how many there are."""
    if not notes:
        return ""
    first = " ".join(notes[0].split()).replace("|", "/")[:_LONGEST]
    return first if len(notes) == 1 else f"{first} (and {len(notes) - 1} more)"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _scaling(device: str) -> str:
    """Say whether 8-bit products are scaled right, and whether by Triton."""
    sums = torch.arange(-2000, 2000, device=device).view(4, 1000).bfloat16()
    scale_x = torch.rand(4, 1, device=device)
    scale_w = torch.rand(1000, 1, device=device)
    expected = (sums.float() * scale_x * scale_w.view(1, -1)).bfloat16()
    out = scaled(sums, scale_x, scale_w, None, torch.bfloat16)
    words = "ok" if error_of(out, expected.float()) <= TOLERANCE else "WRONG"
    faults = [*scaling.FAULTS, *codec.FAULTS]
    if faults:
        words += f", by PyTorch, since Triton failed with {_shortened(faults)}"
    return f"- packing, and scaling of 8-bit products: {words}"


def _facts(device: torch.device) -> list[str]:
    """List the card, the driver and the versions."""
    named = "no CUDA device"
    if device.type == "cuda":
        card, memory = card_of(device), torch.cuda.get_device_properties(device)
        named = "{}, compute capability {}.{}, {:.0f} GiB, {} KiB a block".format(
            torch.cuda.get_device_name(device),
            *card.capability,
            memory.total_memory / 2**30,
            card.shared_bytes >> 10,
        )
    found = {
        "nm-permute": _version("nm-permute-plugin"),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "Triton": _version("triton"),
        "cuSPARSELt": str(torch.backends.cusparselt.version()),
        "vLLM": _version("vllm"),
    }
    versions = ", ".join(f"{name} {words}" for name, words in found.items())
    return [f"- card: {named}; driver {_driver()}", f"- {versions}"]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """Return the version of NVIDIA's driver, as its own tool says."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown (no nvidia-smi)"
    words = ["--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [command, *words], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.split("\n")[0].strip() or "unknown"
