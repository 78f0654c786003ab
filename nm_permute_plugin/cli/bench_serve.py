# SPDX-License-Identifier: Apache-2.0
"""``nm-permute bench-serve``: time vLLM on sparse kernels and without them."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from nm_permute_plugin._words import install
from nm_permute_plugin.cli.common import find_device, print_table
from nm_permute_plugin.evaluation.throughput import (
    Measurement,
    plot_throughput,
    require_matplotlib,
    throughput_table,
)
from nm_permute_plugin.serving.bench import Workload, engine_arguments

MODULE = "nm_permute_plugin.serving.bench"


def bench_serve(
    checkpoint: Annotated[
        Path | None, Argument(help="Folder of a 2:4 checkpoint.")
    ] = None,
    check: Annotated[
        bool,
        Option("--check", help="Check the kernels on this card; takes no CHECKPOINT."),
    ] = False,
    batch: Annotated[
        list[int] | None,
        Option(min=1, help="Sequences at a time; repeatable (1, 8 and 32)."),
    ] = None,
    prompt_tokens: Annotated[
        int, Option(min=1, help="Tokens of each prompt.")
    ] = Workload.prompt_tokens,
    output_tokens: Annotated[
        int, Option(min=2, help="Tokens to generate for each.")
    ] = Workload.output_tokens,
    repeats: Annotated[
        int, Option(min=1, help="Runs; the median counts.")
    ] = Workload.repeats,
    tensor_parallel_size: Annotated[
        int, Option(min=1, help="GPUs that share the model.")
    ] = Workload.tensor_parallel,
    enforce_eager: Annotated[
        bool, Option("--enforce-eager", help="Run without compiled graphs.")
    ] = False,
    engine: Annotated[
        str, Option(help="Further arguments of vllm.LLM, as a JSON object.")
    ] = "{}",
    out: Annotated[
        Path | None, Option(help="Folder for serve.json and serve.png.")
    ] = None,
) -> None:
    """Time vLLM with a checkpoint, on sparse kernels and without them; needs vLLM."""
    if check:
        if checkpoint is not None:
            raise ValueError(
                f"--check makes weights of its own: leave {checkpoint} out, or --check"
            )
        from nm_permute_plugin.serving.card_check import check_card

        typer.echo(check_card())
        return
    if checkpoint is None:
        raise ValueError(
            "bench-serve takes the folder of a 2:4 checkpoint; with --check instead it "
            "checks the kernels on this machine's card"
        )
    workload = Workload(
        batches=tuple(batch or Workload.batches),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        repeats=repeats,
        tensor_parallel=tensor_parallel_size,
        eager=enforce_eager,
        engine=engine_arguments(engine),
    )
    print_table(time_both_sides(checkpoint, workload, out))
    typer.echo("dense: the same checkpoint, with NM_PERMUTE_SERVE=dense")
    if find_device(None) == "cpu":
        typer.echo("There is no CUDA device: both sides were served dense.")


def time_both_sides(checkpoint: Path, workload: Workload, out: Path | None) -> str:
    """
    Measure both sides, one after the other, and return the table.

    :param checkpoint: a 2:4 one; the dense side is the same with the mode ``dense``
    :param out: the folder that takes ``serve.json`` and ``serve.png``
    :raises ValueError: if the plugin would leave the checkpoint alone
    :raises ModuleNotFoundError: without vLLM, or without matplotlib where ``out`` is given
    :raises RuntimeError: if an engine fails; what it said is on the terminal
    """
    from nm_permute_plugin.checkpoint.config import quantization_config
    from nm_permute_plugin.checkpoint.directory import read_json
    from nm_permute_plugin.serving.detect import MODE_VARIABLE, is_ours, mode

    config = quantization_config(read_json(checkpoint / "config.json"))
    if config is None or not is_ours(config):
        raise ValueError(
            f"{checkpoint} does not say that it is 2:4 sparse, so there is nothing to "
            "compare. Write it with the format sparse-24-bitmask: nm-permute convert"
        )
    if mode() == "dense":
        raise ValueError(f"{MODE_VARIABLE} is dense: both sides would be the same")
    if find_spec("vllm") is None:
        raise ModuleNotFoundError(
            f"vLLM is not installed: {install('vllm')}, in an environment without "
            "llm-compressor"
        )
    if out is not None:
        require_matplotlib()
        out.mkdir(parents=True, exist_ok=True)
    sparse = _measure(checkpoint, workload, mode())
    dense = _measure(checkpoint, workload, "dense")
    if out is not None:
        record = {
            "checkpoint": str(checkpoint),
            "workload": asdict(workload),
            "sparse": [asdict(measurement) for measurement in sparse],
            "dense": [asdict(measurement) for measurement in dense],
        }
        (out / "serve.json").write_text(json.dumps(record, indent=2) + "\n")
        plot_throughput(sparse, dense, out / "serve.png")
    return throughput_table(sparse, dense)


def _measure(checkpoint: Path, workload: Workload, mode: str) -> list[Measurement]:
    """Measure one side, in a process of its own."""
    from nm_permute_plugin.serving.detect import MODE_VARIABLE

    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        words = [str(checkpoint), str(found), json.dumps(asdict(workload))]
        done = subprocess.run(
            [sys.executable, "-m", MODULE, *words],
            env={**os.environ, MODE_VARIABLE: mode},
            stdout=sys.stderr,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(
                f"the engine with {MODE_VARIABLE}={mode} ended with the exit status "
                f"{done.returncode}; the reason is above"
            )
        return [Measurement(**fields) for fields in json.loads(found.read_text())]
