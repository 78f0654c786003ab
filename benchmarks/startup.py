# SPDX-License-Identifier: Apache-2.0
"""
Where do the seconds of a server's first start go, and how good is what it chooses?

``python benchmarks/sparse_kernels.py --startup`` runs this. For each dtype the four linear
shapes of LLaMA-3-8B are announced and prepared as a server does with an empty cache
folder. Then every kernel and setting is measured in full for every number of tokens:
``ratio`` is the time of what was chosen over the time of the fastest.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe, get_context
from pathlib import Path

import torch

from nm_permute_plugin.serving import cache, linear
from nm_permute_plugin.serving.kernel_table import BUCKETS, Choice
from nm_permute_plugin.serving.measuring import Measured, measure
from nm_permute_plugin.serving.ops import KERNELS, TABLES
from nm_permute_plugin.serving.tune import (
    Contest,
    Parts,
    cold_copies,
    random_tokens,
    random_weight,
    reference,
)

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
DTYPES = {
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
BUDGET = 130.0
"""After so many seconds no more choices are compared."""


def main(kinds: list[str], file: Path | None) -> None:
    """Print everything as it comes, and write it to a file after each part."""
    started = time.perf_counter()
    record: dict = {"starts": [], "choices": []}
    tables: dict[str, dict] = {}
    for kind in kinds:
        for row in isolated(first_start, kind):
            tables[kind] = row.pop("tables")
            record["starts"].append(row)
        write(record, file)
    if not tables:
        sys.exit("benchmarks/sparse_kernels.py --startup needs a CUDA device")
    for kind in tables:
        for shape in tables[kind]:
            if time.perf_counter() - started > BUDGET:
                print(f"{kind} {shape}: no time left to compare its choices")
                continue
            record["choices"] += isolated(compare, kind, shape, tables[kind][shape])
            write(record, file)
    summarize(record)
    print(f"{time.perf_counter() - started:.0f} s in all")


def write(record: dict, file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps(record, indent=1))


def first_start(kind: str, results) -> None:
    """Prepare a layer of each shape as a server does; print what took how long."""
    print(f"\n{kind} on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    weights = {shape: random_weight(shape, DTYPES[kind], "cuda") for shape in SHAPES}
    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder, kept() as measured:
        os.environ[cache.FOLDER] = folder
        started = time.perf_counter()
        for weight in weights.values():
            linear.expect(weight, "auto")
        layers = {}
        seconds = {}
        for shape, weight in weights.items():
            before = time.perf_counter()
            layers[shape] = linear.SparseLinear.prepare(weight, "auto", is_checked=True)
            torch.cuda.synchronize()
            seconds[f"{shape}"] = time.perf_counter() - before
        total = time.perf_counter() - started
    process = sum(m["seconds_in_all"] for m in measured)
    print(f"first start: {total:.1f} s, of which {process:.1f} s measure in a process")
    print("  checking and packing in the server:", f"{total - process:.1f} s")
    for found in measured:
        for name, parts in found["seconds"].items():
            words = ", ".join(f"{p} {s:.2f}" for p, s in parts.items())
            print(f"  {name or 'process'}: {sum(parts.values()):.2f} s ({words})")
        for fault in (*found["faults"], *found["crashes"]):
            print(f"  FAULT: {fault}")
    for shape, layer in layers.items():
        if isinstance(layer, str):
            print(f"  {shape} stays dense: {layer}")
    tables = {
        f"{name.split(')')[0]})": json.loads(table.to_json())["buckets"]
        for name, table in TABLES.items()
    }
    results.send(
        {
            "dtype": kind,
            "card": torch.cuda.get_device_name(),
            "seconds": total,
            "process": process,
            "measured": measured,
            "tables": tables,
        }
    )


@contextmanager
def kept() -> Iterator[list[dict]]:
    """Keep what the measuring processes say, with the seconds that they took."""
    found: list[dict] = []

    def keeping(*arguments) -> Measured:
        started = time.perf_counter()
        measured = measure(*arguments)
        found.append(
            {
                "seconds_in_all": time.perf_counter() - started,
                "seconds": measured.seconds,
                "faults": [f"{n}: {why}" for n, why in measured.faults.items()],
                "crashes": [f"{n}: {why}" for n, why in measured.crashes.items()],
            }
        )
        return measured

    linear.measure, before = keeping, linear.measure
    try:
        yield found
    finally:
        linear.measure = before


def compare(kind: str, shape: str, buckets: list, results) -> None:
    """Measure everything in full, and print the chosen beside the fastest."""
    rows, channels = map(int, shape.strip("()").split(","))
    weight = random_weight((rows, channels), DTYPES[kind], "cuda")
    names = ["dense", "cusparselt", "mma_sp"]
    copies = {name: cold_copies(KERNELS[name].prepare(weight)) for name in names}
    chosen_for = {tokens: Choice(*chosen) for tokens, chosen, _ in buckets}
    for tokens in BUCKETS:
        if tokens not in chosen_for:
            print(f"{kind:>5} {shape:>14} {tokens:6d}  no kernel table")
            continue
        chosen = chosen_for[tokens]
        settings = tuple(chosen.settings)
        x = random_tokens(weight, tokens)
        parts = Parts()
        contest = Contest(x, reference(weight, x), parts)
        for name in names:
            more = settings if name == chosen.kernel else None
            contest.add(KERNELS[name], copies[name], more)
        choices, _ = contest.decide(slack=float("inf"))
        times = {(c.kernel, tuple(c.settings)): c.microseconds for c in choices}
        fastest = min(times, key=times.__getitem__)
        row = {
            "dtype": kind,
            "shape": shape,
            "tokens": tokens,
            "chosen": [chosen.kernel, settings],
            "chosen_microseconds": times[chosen.kernel, settings],
            "fastest": fastest,
            "fastest_microseconds": times[fastest],
            "dense_microseconds": times["dense", ()],
            "seconds": parts,
            "every": [[*key, round(taken, 2)] for key, taken in times.items()],
        }
        results.send(row)
        print(
            f"{kind:>5} {shape:>14} {tokens:6d}  {row['chosen_microseconds']:8.1f} "
            f"{chosen.kernel}{list(settings)}  fastest {row['fastest_microseconds']:8.1f} "
            f"{fastest[0]}{list(fastest[1])}  dense {row['dense_microseconds']:8.1f}  "
            f"ratio {ratio_of(row):.3f}",
            flush=True,
        )


def ratio_of(row: dict) -> float:
    """The time of what was chosen over the time of the fastest."""
    return row["chosen_microseconds"] / row["fastest_microseconds"]


def summarize(record: dict) -> None:
    """Print the seconds of each start, and how far the choices are from the fastest."""
    for row in record["starts"]:
        print(f"{row['dtype']}: first start {row['seconds']:.1f} s")
    choices = record["choices"]
    if not choices:
        return
    ratios = sorted(ratio_of(row) for row in choices)
    worst = max(choices, key=ratio_of)
    slower = [row["chosen_microseconds"] / row["dense_microseconds"] for row in choices]
    print(
        f"{len(ratios)} choices over the fastest: mean {sum(ratios) / len(ratios):.4f}, "
        f"median {ratios[len(ratios) // 2]:.4f}, worst {ratios[-1]:.3f} "
        f"({worst['dtype']} {worst['shape']}, {worst['tokens']} tokens); "
        f"over dense: worst {max(slower):.3f}"
    )


def isolated(function: Callable, *arguments) -> list[dict]:
    """
    What a function sends, from a process of its own: a kernel that crashes ends that.

    The parent never touches the GPU, so that its children can be forked.
    """
    here, there = Pipe(duplex=False)
    process = get_context("fork").Process(
        target=reporting, args=(function, *arguments, there)
    )
    process.start()
    there.close()
    rows = []
    try:
        while True:
            rows.append(here.recv())
    except EOFError:
        process.join()
    return rows


def reporting(function: Callable, *arguments) -> None:
    try:
        function(*arguments)
    except Exception:  # the other shapes' figures are still worth having
        traceback.print_exc()
