# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' scripts import their siblings, as they do when they are run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(scope="session")
def text_file(
    tmp_path_factory: pytest.TempPathFactory,
    chain_rows: Callable[..., Tensor],
    words: Callable[[Tensor], str],
) -> Callable[[str, int], str]:
    """A factory: the path of a text that the tiny trained model knows the like of."""
    folder = tmp_path_factory.mktemp("texts")

    def write(name: str, seed: int) -> str:
        path = folder / f"{name}.txt"
        path.write_text(words(chain_rows(24, 32, seed=seed)))
        return str(path)

    return write


@pytest.fixture(scope="session")
def arguments(
    trained_checkpoint: Path, text_file: Callable[[str, int], str]
) -> list[str]:
    """A model and text to train on, on the command line, small enough for seconds."""
    sizes = ["--sequence-length", "32", "--rows", "24", "--batch-size", "4"]
    train = ["--train", text_file("train", 999)]
    return [str(trained_checkpoint), *train, *sizes, "--device", "cpu"]


@pytest.fixture
def run_script() -> Callable[..., str]:
    """A runner: what a script prints in a process of its own."""

    def run(script: Path, *words: object) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
