# SPDX-License-Identifier: Apache-2.0
"""
How fast is the codec beside the format's first implementation, and what does it take?

Usage::

    python benchmarks/codec.py --oracle PYTHON [--gigabytes 4] [--device cuda]

PYTHON is an interpreter with compressed-tensors 0.14.0.1; without it only our side is
timed. On CPUs both sides run on one thread, in turns of this one run. The second table
is the peak memory of converting a synthetic checkpoint of four shards, in a process of
its own and on one thread.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from nm_permute_plugin.checkpoint.codec import compress, decompress
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.checkpoint.shard_writer import ShardWriter
from nm_permute_plugin.checkpoint.writer import convert

ORACLE = Path(__file__).parents[1] / "tests" / "checkpoint" / "oracle" / "oracle.py"
SIZE = 2048
SHARDS = 4


def sparse_weight(
    dtype: torch.dtype, rows: int, columns: int, device: str = "cpu", seed: int = 0
) -> torch.Tensor:
    """A random 2:4 weight: of every four, two random ones are zero."""
    generator = torch.Generator(device).manual_seed(seed)
    pairs = torch.tensor([3, 5, 6, 9, 10, 12], device=device)
    groups = rows * columns // 4
    drawn = torch.randint(6, (groups, 1), generator=generator, device=device)
    keep = pairs[drawn] >> torch.arange(4, device=device) & 1
    weight = torch.randn(groups, 4, generator=generator, device=device) * 30
    return weight.masked_fill(keep == 0, 0).view(rows, columns).to(dtype)


def seconds(call: Callable[[], object], device: str, turns: int = 5) -> float:
    """The shortest of a few turns, after one that does not count."""
    taken = []
    for _ in range(turns + 1):
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def time_codec(oracle: str | None, device: str, size: int) -> None:
    """Print GB of dense weights a second, ours and the oracle's."""
    torch.set_num_threads(1)
    weights = {
        str(dtype)[6:]: sparse_weight(dtype, size, size, device) for dtype in WORDS
    }
    theirs: dict[str, list[float]] = {}
    if oracle:
        with tempfile.TemporaryDirectory() as folder:
            on_cpu = {name: weight.cpu() for name, weight in weights.items()}
            save_file(on_cpu, Path(folder) / "weights")
            done = subprocess.run(
                [oracle, str(ORACLE), "time", str(Path(folder) / "weights")],
                capture_output=True,
                text=True,
                check=True,
            )
        theirs = json.loads(done.stdout.splitlines()[-1])
    where = "one CPU thread" if device == "cpu" else torch.cuda.get_device_name()
    print(f"GB of dense weights a second, [{size}, {size}], {where}")
    print(f"{'':15}{'compress':>10}{'oracle':>8}{'ratio':>7}", end="")
    print(f"{'decompress':>12}{'oracle':>8}{'ratio':>7}")
    for name, weight in weights.items():
        stored = compress(weight)
        parts = (stored.compressed, stored.bitmask, (size, size))
        ours = [
            seconds(lambda weight=weight: compress(weight), device),
            seconds(lambda parts=parts: decompress(*parts), device),
        ]
        gigabytes = weight.nbytes / 1e9
        print(f"{name:15}", end="")
        for took, other, width in zip(
            ours, theirs.get(name, [None, None]), (10, 12), strict=True
        ):
            print(f"{gigabytes / took:{width}.2f}", end="")
            if other is None:
                print(f"{'-':>8}{'-':>7}", end="")
            else:
                print(f"{gigabytes / other:8.3f}{other / took:6.0f}x", end="")
        print()


def make_checkpoint(path: Path, gigabytes: float) -> None:
    """A checkpoint of four shards of bf16 matrices, 4096 wide."""
    path.mkdir()
    per_shard = max(1, round(gigabytes * 1e9 / SHARDS / (4096 * 4096 * 2)))
    weight = sparse_weight(torch.bfloat16, 4096, 4096)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        names = [f"layers.{shard}.linear{i}.weight" for i in range(per_shard)]
        announced = {name: (weight.dtype, tuple(weight.shape)) for name in names}
        with ShardWriter(path / file, announced, {"format": "pt"}) as out:
            for name in names:
                out.write(name, weight)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")


def peak_memory() -> float:
    """The most that this process has had in memory, in GB (Linux)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def measure_convert(folder: Path) -> None:
    """Convert there and back; print seconds, sizes and this process's peak memory."""
    source = folder / "dense"
    largest = max(file.stat().st_size for file in source.glob("*.safetensors")) / 1e9
    before = peak_memory()
    for name, origin, form in [
        ("sparse", source, "sparse-24-bitmask"),
        ("back", folder / "sparse", "dense"),
    ]:
        started = time.perf_counter()
        done = convert(origin, folder / name, form)
        took = time.perf_counter() - started
        peak = peak_memory()
        print(
            f"to {form}: {done.bytes_before / 1e9:.2f} -> {done.bytes_after / 1e9:.2f} "
            f"GB ({done.bytes_after / done.bytes_before:.4f}) in {took:.1f} s; peak "
            f"{peak - before:.2f} GB above {before:.2f} GB of imports; largest shard "
            f"{largest:.2f} GB"
        )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--oracle", help="interpreter with compressed-tensors 0.14.0.1")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_convert(arguments.measure)
        return
    time_codec(arguments.oracle, arguments.device, arguments.size)
    if arguments.gigabytes > 0:
        folder = Path(tempfile.mkdtemp())
        try:
            make_checkpoint(folder / "dense", arguments.gigabytes)
            command = [sys.executable, __file__, "--measure", str(folder)]
            os.sync()
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, env=one_thread)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
