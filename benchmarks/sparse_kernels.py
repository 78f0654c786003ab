# SPDX-License-Identifier: Apache-2.0
"""
How fast is a 2:4 product beside the dense one, at every number of tokens?

Usage::

    PYTHONPATH=. python benchmarks/sparse_kernels.py [--json FILE] [--dtypes bf16 fp8 int8]
    PYTHONPATH=. python benchmarks/sparse_kernels.py --startup [--json FILE]

Needs a CUDA device. The four linear shapes of LLaMA-3-8B; every kernel and setting in
one run, each from replayed CUDA graphs over copies of the weight that together do not
fit the L2 cache. ``dense`` is the dense product of the same dtype, for int8 float8's
(cuBLAS has no int8 product worth comparing). Dense products of 8 bits include their
scales, one a token and one an output channel. Sparse ones leave them to what reads the
outputs, as compiled models do (``ratio``), or to a pass of its own, as models do that are
not compiled (``passed``). ``bound`` is the share of the memory bandwidth measured in this
run that the chosen kernel reaches. Errors are the largest over the first 64 tokens, as a
share of the largest output, against float64. ``--startup`` tells instead where the seconds
of a server's first start go, and how good its choices are (``startup.py``).
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import startup
from nm_permute_plugin.serving.kernel_table import Choice
from nm_permute_plugin.serving.kernels.kernel import DTYPES_8
from nm_permute_plugin.serving.kernels.scaling import scaled
from nm_permute_plugin.serving.ops import KERNELS
from nm_permute_plugin.serving.tune import (
    Contest,
    choose,
    cold_copies,
    error_of,
    microseconds,
    random_tokens,
    random_weight,
)
from startup import DTYPES, SHAPES, isolated

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)


def bandwidth() -> float:
    """Bytes a second of a device-to-device copy, counting those read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    taken = microseconds([lambda: target.copy_(source)], least=30000)
    return 2 * source.nbytes / taken * 1e6


class Scales(NamedTuple):
    """Of products of 8 bits: one a token, one an output channel."""

    scale_x: Tensor
    scale_w: Tensor

    @classmethod
    def of(cls, tokens: int, rows: int) -> "Scales":
        return cls(
            torch.rand(tokens, 1, device="cuda"), torch.rand(rows, 1, device="cuda")
        )


def dense_microseconds(copies: list[Tensor], x: Tensor, scales: Scales | None) -> float:
    """The dense product, with its scales where it is of 8 bits."""

    def product(weight: Tensor) -> Tensor:
        if scales is None:
            return torch.nn.functional.linear(x, weight)
        factors = scales.scale_x, scales.scale_w.t()
        return torch._scaled_mm(x, weight.t(), *factors, out_dtype=torch.bfloat16)

    return microseconds([partial(product, weight) for weight in copies])


def passed_microseconds(
    choice: Choice, copies: list[Tensor], x: Tensor, rows: int, scales: Scales
) -> float:
    """A kernel's product and the pass that scales it."""

    def product(packed: Tensor) -> Tensor:
        sums = KERNELS[choice.kernel].run(packed, x, rows, choice.settings)
        return scaled(sums, *scales, None, torch.bfloat16)

    return microseconds([partial(product, packed) for packed in copies])


def bench_shape(rows, channels, kind, copy_rate, fp8_dense, results) -> None:
    """All numbers of tokens by one weight; a printed row each, sent to the parent."""
    weight = random_weight((rows, channels), DTYPES[kind], "cuda")
    packed_copies = {}
    for name, kernel in KERNELS.items():
        reason = kernel.unsupported(weight)
        if reason is None:
            packed_copies[name] = cold_copies(kernel.prepare(weight))
        else:
            print(f"{name} does not support {kind} {rows} x {channels}: {reason}")
    for tokens in TOKENS:
        x = random_tokens(weight, tokens)
        scales = Scales.of(tokens, rows) if DTYPES[kind] in DTYPES_8 else None
        truth = x[:64].double() @ weight.double().t()
        best: dict[str, Choice] = {}
        every, errors = {}, {}
        for name, copies in packed_copies.items():
            contest = Contest(x, truth.float())
            contest.add(KERNELS[name], copies)
            choices, _ = contest.decide(slack=float("inf"))
            every[name] = [
                (choice.settings, round(choice.microseconds, 2)) for choice in choices
            ]
            if choices:
                best[name] = min(choices, key=lambda choice: choice.microseconds)
                out = KERNELS[name].run(copies[0], x, rows, best[name].settings)
                errors[name] = error_of(out.double(), truth)
        chosen = choose(list(best.values()))
        copies = packed_copies[chosen.kernel]
        times = {name: choice.microseconds for name, choice in best.items()}
        if kind == "int8":
            dense = fp8_dense.get((rows, channels, tokens), float("nan"))
        else:
            dense = dense_microseconds(packed_copies["dense"], x, scales)
        passed = chosen.microseconds
        if scales is not None:
            passed = passed_microseconds(chosen, copies, x, rows, scales)
        touched = copies[0].nbytes + x.nbytes + 2 * tokens * rows
        row = {
            "shape": f"{rows}x{channels}",
            "dtype": kind,
            "tokens": tokens,
            "dense": dense,
            "times": times,
            "chosen": chosen.kernel,
            "settings": chosen.settings,
            "ratio": dense / chosen.microseconds,
            "passed": dense / passed,
            "bound": touched / copy_rate / (chosen.microseconds * 1e-6),
            "errors": errors,
            "every": every,
        }
        results.send(row)
        cells = "".join(
            f"{times[n]:9.1f}" if n in times else "        -"
            for n in ("cusparselt", "mma_sp", "triton")
        )
        worst = max(errors.values(), default=float("nan"))
        print(
            f"{row['shape']:>11} {kind:>5} {tokens:6d} {dense:9.1f}{cells}  "
            f"{row['ratio']:5.2f} {row['passed']:6.2f} {row['bound']:6.2f}  "
            f"{worst:.4f}  {chosen.kernel}{list(chosen.settings)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--startup", action="store_true", help="of a first start")
    arguments = parser.parse_args()
    started = time.perf_counter()
    if arguments.startup:
        startup.main(arguments.dtypes, arguments.json)
        return
    record: dict = {"results": []}
    rows_of = record["results"]
    for row in isolated(describe):
        record["machine"] = row
        print(row)
    if "machine" not in record:
        sys.exit("benchmarks/sparse_kernels.py needs a CUDA device")
    print(
        "      shape dtype tokens     dense  cuSPARSELt  mma_sp  triton  ratio passed  "
        "bound  error   chosen     (microseconds)"
    )
    rate = record["machine"]["copy_bytes_per_second"]
    for kind in arguments.dtypes:
        for rows, channels in SHAPES:
            fp8_dense = {
                (rows, channels, row["tokens"]): row["dense"]
                for row in rows_of
                if row["dtype"] == "fp8" and row["shape"] == f"{rows}x{channels}"
            }
            rows_of += isolated(bench_shape, rows, channels, kind, rate, fp8_dense)
            if arguments.json:
                arguments.json.write_text(json.dumps(record, indent=1))
    print(f"{time.perf_counter() - started:.0f} s in all")


def describe(results) -> None:
    """The machine, and its measured copy rate."""
    results.send(
        {
            "card": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cusparselt": torch.backends.cusparselt.version(),
            "copy_bytes_per_second": bandwidth(),
        }
    )


if __name__ == "__main__":
    main()
