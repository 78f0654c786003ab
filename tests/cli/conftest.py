# SPDX-License-Identifier: Apache-2.0
"""A recipe, text and a folder that is full, for the tests of the command."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for commands.py beside the tests
from commands import listing  # noqa: E402


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that takes no time."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "prune_stage:\n  permutation_modifiers:\n    LearnablePermutationModifier:\n"
        "      method: search\n      search: {rounds: 2}\n"
    )
    return path


@pytest.fixture
def ready(tiny_checkpoint, recipe: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """Model, recipe and text lie in ``tmp_path``; what is there now."""
    tiny_checkpoint()
    return listing(tmp_path)


@pytest.fixture
def text_file(tmp_path: Path, chain_rows, words) -> Path:
    """A file of 1280 tokens that a tiny checkpoint knows."""
    path = tmp_path / "text.txt"
    path.write_text(words(chain_rows(40, 32, seed=3)))
    return path


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB, less than a tiny checkpoint's 80; needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
