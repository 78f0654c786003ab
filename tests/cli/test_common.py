# SPDX-License-Identifier: Apache-2.0
"""What a person can mend is one line; an internal error keeps its traceback."""

import importlib
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
import yaml
from click.testing import Result
from typer.testing import CliRunner

from nm_permute_plugin.cli import bench_serve
from nm_permute_plugin.cli.common import (
    PRUNE_OUT_OF_MEMORY,
    Commands,
    find_device,
    stopped_cleanly,
    telling_of_imports,
)
from nm_permute_plugin.cli.prune import spread
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.serving.bench import Workload


def run(work: Callable[[], object], name: str, *options: str) -> Result:
    """Run a command of this name that does the work."""
    app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @app.callback()
    def main(debug: Annotated[bool, typer.Option("--debug")] = False) -> None:
        pass

    @app.command(name)
    def command() -> None:
        work()

    return CliRunner().invoke(app, [*options, name])


def raising(error: Exception) -> Callable[[], object]:
    def work() -> None:
        raise error

    return work


def failing_engine() -> None:
    """A refusal of this package that is a RuntimeError."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        bench_serve._measure(Path("none"), Workload(), "dense")


def failing_operator() -> None:
    """A fault inside of torch, called from this package."""
    spread([Path()], -1)


MENDABLE = [
    ValueError("no text"),
    FileNotFoundError("no file"),
    PermissionError("no right"),
    ModuleNotFoundError("no vLLM"),
]
INTERNAL = [RuntimeError("shapes"), TypeError("None"), KeyError("x"), IndexError("3")]


@pytest.mark.parametrize("error", MENDABLE, ids=lambda error: type(error).__name__)
def test_what_can_be_mended_is_one_line(error: Exception) -> None:
    result = run(raising(error), "evaluate")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert (result.stdout, result.stderr) == ("", f"error: {error}\n")


@pytest.mark.parametrize("error", INTERNAL, ids=lambda error: type(error).__name__)
def test_an_internal_error_keeps_its_traceback(error: Exception) -> None:
    result = run(raising(error), "evaluate")
    assert result.exception is error
    assert result.exit_code == 1


def test_a_refusal_of_this_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_serve, "MODULE", "no_such_module_anywhere")
    result = run(failing_engine, "bench-serve")
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "NM_PERMUTE_SERVE=dense ended with the exit status 1" in result.stderr


def test_a_fault_in_an_operator_is_no_refusal() -> None:
    result = run(failing_operator, "prune")
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize(
    "error", [MENDABLE[0], torch.OutOfMemoryError("CUDA out of memory")]
)
def test_debug_shows_every_traceback(error: Exception) -> None:
    assert run(raising(error), "prune", "--debug").exception is error


FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
)


@pytest.mark.parametrize(
    ("command", "remedies"),
    [
        ("prune", ["micro_batch_size", "gradient_checkpointing", "layer_wise"]),
        ("evaluate", ["--batch-size", "--device cpu"]),
        ("lm-eval", ["--batch_size", "--device cpu"]),
    ],
)
def test_full_memory_comes_with_the_remedies(command: str, remedies: list[str]) -> None:
    result = run(raising(FULL), command)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    said = "error: CUDA out of memory. Tried to allocate 2.00 GiB: "
    assert result.stderr.startswith(said)
    assert [remedy for remedy in remedies if remedy not in result.stderr] == []
    assert len(result.stderr.splitlines()) == 1


def test_full_memory_of_the_host_is_told_too() -> None:
    assert "out of memory: " in run(raising(MemoryError()), "prune").stderr


def test_a_device_is_found_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert find_device("cpu") == "cpu"
    assert find_device("cuda") == "cuda"
    assert find_device("cuda:0") == "cuda:0"
    with pytest.raises(ValueError, match="--device cuda:1: torch finds 1 CUDA devices"):
        find_device("cuda:1")
    with pytest.raises(ValueError, match="--device gpu is no device"):
        find_device("gpu")


def process(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nm_permute_plugin", *map(str, words)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_module_runs_the_command_and_a_variable_shows_tracebacks() -> None:
    plain = process("evaluate", "none", "--text", __file__)
    assert plain.returncode == 1
    assert plain.stderr.startswith("error: none does not exist; give a model's folder")
    assert len(plain.stderr.splitlines()) == 1
    debug = process("evaluate", "none", "--text", __file__, NM_PERMUTE_DEBUG="1")
    assert debug.returncode == 1
    assert debug.stderr.startswith("Traceback")


def test_a_slow_import_is_told_and_a_fast_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, seconds in (("fast_host", 0.0), ("slow_host", 1.0)):
        lines = f"import time\nwait = {seconds}\ntime.sleep(wait)\n"
        (tmp_path / f"{name}.py").write_text(lines)
        with telling_of_imports(after=0.2):
            importlib.import_module(name)
    assert capsys.readouterr().err == "Still importing slow_host ...\n"


def test_a_signal_is_told_where_a_block_has_replaced_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work() -> None:
        with redirect_stderr(io.StringIO()):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit), stopped_cleanly():
        work()
    assert "error: stopped by SIGTERM" in capsys.readouterr().err


def test_the_help_imports_nothing_heavy() -> None:
    done = process("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "llmcompressor", "vllm", "scipy"}


@pytest.mark.slow
def test_a_model_of_the_hub_is_pruned_and_logs_stay_out_of_the_result(
    tiny_checkpoint, recipe: Path, text_file: Path, tmp_path: Path
) -> None:
    # The cache of a model that was downloaded before: no network is needed.
    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    tiny_checkpoint().rename(cached / "snapshots" / ("0" * 40))
    out = tmp_path / "out"
    rest = ["--text", text_file, "--sequence-length", 32, "--device", "cpu"]
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = process("prune", "someone/tiny", recipe, out, *rest, **hub)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{out}: calibrated on 1280 tokens, ")
    assert line.endswith(" --dense someone/tiny")
    assert "Retained score" in done.stderr


def test_the_remedy_for_full_memory_is_a_recipe_that_is_taken() -> None:
    (memory,) = re.findall(r"memory: \{.*?\}", PRUNE_OUT_OF_MEMORY)
    (objective,) = re.findall(r"objective: \w+", PRUNE_OUT_OF_MEMORY)
    assert Settings(**yaml.safe_load(memory)).memory.micro_batch_size == 1
    assert Settings(**yaml.safe_load(objective)).layer_wise
