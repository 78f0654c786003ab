# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' scripts import their siblings, as they do when they are run."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(scope="session")
def arguments(
    tmp_path_factory: pytest.TempPathFactory,
    trained_checkpoint: Path,
    chain_rows: Callable[..., Tensor],
    words: Callable[[Tensor], str],
) -> list[str]:
    """A model and texts on the command line, small enough for seconds."""
    folder = tmp_path_factory.mktemp("texts")
    for name, seed in (("train", 999), ("test", 1000)):
        (folder / f"{name}.txt").write_text(words(chain_rows(24, 32, seed=seed)))
    texts = ["--train", str(folder / "train.txt"), "--test", str(folder / "test.txt")]
    sizes = ["--sequence-length", "32", "--rows", "24", "--batch-size", "4"]
    return [str(trained_checkpoint), *texts, *sizes, "--device", "cpu"]
