# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped by a signal leaves nothing, or what the next run clears away."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import listing, prune

ENDLESS = (
    "prune_stage:\n  permutation_modifiers:\n    LearnablePermutationModifier:\n"
    "      method: learned\n      learn: {steps: 1000000}\n      batch_size: 4\n"
)


def hear_all_signals() -> None:
    """Whoever started the tests may have switched signals off, as nohup does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def running(ready: list[str], tmp_path: Path, text_file: Path) -> subprocess.Popen[str]:
    """A run of the command, in the middle of its work."""
    (tmp_path / "endless.yaml").write_text(ENDLESS)
    command = [sys.executable, "-m", "nm_permute_plugin", "prune"]
    paths = [tmp_path / name for name in ("dense", "endless.yaml", "out")]
    options = ["--text", text_file, "--sequence-length", "32", "--device", "cpu"]
    process = subprocess.Popen(
        list(map(str, [*command, *paths, *options])),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        preexec_fn=hear_all_signals,
    )
    while not unfinished(tmp_path):
        assert process.poll() is None, process.stderr
        time.sleep(0.05)
    return process


def unfinished(folder: Path) -> list[str]:
    return [name for name in listing(folder) if name.endswith(".unfinished")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_run_that_is_told_to_stop_leaves_nothing(
    running: subprocess.Popen[str], tmp_path: Path, number: int, status: int
) -> None:
    running.send_signal(number)
    _, errors = running.communicate()
    assert running.returncode == status
    name = signal.Signals(number).name
    assert f"error: stopped by {name}; no unfinished folder is left" in errors
    assert "Traceback" not in errors
    assert unfinished(tmp_path) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_after_one_that_was_killed_clears_away_what_it_left(
    running: subprocess.Popen[str], tmp_path: Path, text_file: Path
) -> None:
    running.kill()
    running.communicate()
    assert len(unfinished(tmp_path)) == 1
    done = prune(tmp_path, "--text", text_file)
    assert done.exit_code == 0, done.output
    assert unfinished(tmp_path) == []
    assert (tmp_path / "out" / "config.json").exists()
