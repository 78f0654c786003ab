# SPDX-License-Identifier: Apache-2.0
"""Results go to stdout and logs to stderr; nothing there misleads, and --quiet is quiet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nm_permute_plugin.checkpoint.record import write_record
from nm_permute_plugin.cli.logs import MISLEADING
from nm_permute_plugin.cli.prune import _outcome


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
    r"out: calibrated on 1280 tokens, \d+\.\d minutes, \d+ kB, (\d+\.\d)% of the wanda "
    r"score kept \((\d+\.\d)% without a permutation\), validation loss (\d\.\d+) -> "
    r"(\d\.\d+) \(KL divergence from the dense model, nats a token\)"
    r"(?:; report: out/nm_permute/report\.html)?; next: nm-permute evaluate out "
    r"--text TEST\.txt --dense dense\n"
)


def outcome(folder: Path, **report: object) -> str:
    modifier = {"score": "wanda", "method": "learned", "prune": True}
    stored = {"retained": [0.75, 0.8], "history": [], "recovered": [], **report}
    stored["modifier"] = modifier | report.get("modifier", {})
    write_record(folder, {}, stored)
    return _outcome(folder)


def test_the_outcome_says_what_is_kept_and_lost(tmp_path: Path) -> None:
    kept = "80.0% of the wanda score kept"
    history = [{"validation": 0.5}, {"validation": 0.25}, {"validation": 0.3}]
    without = " (75.0% without a permutation)"
    assert outcome(tmp_path) == kept + without
    assert outcome(tmp_path, modifier={"method": "identity"}) == kept
    learned = outcome(tmp_path, history=history)
    assert learned == f"{kept}{without}, validation loss 0.500 -> 0.250"
    stages = [
        {"validation": [0.25, 0.2], "kept": True},
        {"validation": [0.2, 0.1], "kept": False},
    ]
    recovered = outcome(tmp_path, history=history, recovered=stages)
    assert recovered == f"{kept}{without}, validation loss 0.500 -> 0.200"
    # Another modifier prunes, by a score of its own.
    folded = outcome(tmp_path, modifier={"prune": False})
    assert folded == "a mask by wanda keeps 75.0% -> 80.0% of the score"


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
