# SPDX-License-Identifier: Apache-2.0
"""A kernel that cannot run is found out in a process of its own."""

import subprocess

import pytest
import torch
from weights import sparse_weight

from nm_permute_plugin.serving import probe
from nm_permute_plugin.serving.probe import crash_reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="the point is a missing GPU")
def test_a_process_that_dies_is_told_with_its_last_words() -> None:
    reason = crash_reason("mma_sp", sparse_weight(32, 128, torch.bfloat16))
    assert reason
    assert reason.startswith("a process that tried it ended with exit status 1: ")
    assert "Error" in reason


@pytest.mark.parametrize(
    ("script", "seconds", "told"),
    [
        ("pass", 60, None),
        ("import os; os.kill(os.getpid(), 4)", 60, "ended with signal SIGILL"),
        ("import time; time.sleep(60)", 1, "had not ended after 1 s"),
    ],
    ids=["good", "crash", "hang"],
)
def test_how_a_process_ended_is_told(
    script: str, seconds: int, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subprocess.run

    def stand_in(command: list[str], **options: object):
        return run([command[0], "-c", script], **options)

    monkeypatch.setattr(subprocess, "run", stand_in)
    monkeypatch.setattr(probe, "TIMEOUT", seconds)
    reason = crash_reason("mma_sp", sparse_weight(32, 128, torch.bfloat16))
    assert reason == (told and f"a process that tried it {told}")
