# SPDX-License-Identifier: Apache-2.0
"""Results go to stdout and logs to stderr; nothing there misleads, and --quiet is quiet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nm_permute_plugin.cli.logs import MISLEADING


def run(folder: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own: hosts set their logs up when imported."""
    return subprocess.run(
        [sys.executable, "-m", "nm_permute_plugin", *map(str, words)],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


PRUNE = ["prune", "dense", "recipe.yaml", "out", "--text", "text.txt"]
PRUNE += ["--sequence-length", "32"]
EVALUATE = ["evaluate", "out", "--text", "text.txt", "--sequence-length", "32"]
OUTCOME = (
    r"out: 1280 tokens, \d+\.\d minutes, 0\.1 MB, (\d+\.\d)% of the wanda score kept "
    r"\((\d+\.\d)% without a permutation\), validation loss (\d\.\d+) -> (\d\.\d+); next: "
    r"nm-permute evaluate out --text TEST\.txt --dense dense\n"
)


@pytest.mark.slow
def test_results_are_on_stdout_and_logs_on_stderr(
    ready: list[str], tmp_path: Path
) -> None:
    done = run(tmp_path, *PRUNE)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(OUTCOME, done.stdout)
    assert found, done.stdout
    after, before, start, best = map(float, found.groups())
    assert after >= before
    assert best <= start
    # The log tells what is done and where, and which lines of the hosts are left out.
    assert "14 linears are pruned 2:4 by wanda, method search" in done.stderr
    assert "1152 tokens to learn from, on cpu" in done.stderr
    assert "Compression lifecycle initialized" in done.stderr
    assert [part for part in MISLEADING if part in done.stderr] == []
    assert "offloaded modules" not in done.stderr
    assert "Dispatching" not in done.stderr
    assert ".unfinished" not in done.stderr
    # No bar without an end.
    assert re.findall(r"\w[\w ]*: \d+it ", done.stderr) == []


@pytest.mark.slow
def test_quiet_shows_results_and_errors_only(ready: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, "--quiet", *PRUNE)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(OUTCOME, done.stdout)
    again = run(tmp_path, "--quiet", *PRUNE)
    assert (again.returncode, again.stdout) == (1, "")
    assert re.fullmatch(
        r"error: .*out exists and is not an empty folder.*\n", again.stderr
    )
    measured = run(tmp_path, "--quiet", *EVALUATE)
    assert (measured.returncode, measured.stderr) == (0, "")
    assert measured.stdout.startswith("out: perplexity ")
