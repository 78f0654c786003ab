# SPDX-License-Identifier: Apache-2.0
"""A kernel that cannot run is found out in a process of its own, and left out."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from weights import sparse_weight

from nm_permute_plugin.serving import measuring, tune
from nm_permute_plugin.serving.kernel_table import BUCKETS, Bucket, Choice, KernelTable
from nm_permute_plugin.serving.measuring import Asked, crash_reason, measure

BOTH = ["dense", "mma_sp"]
ASKED = {name: Asked(32, 128, "bfloat16", BOTH) for name in ("first", "second")}
GPU = torch.device("cuda:0")
CRASH = "import os; os.kill(os.getpid(), 4)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the point is a missing GPU")
def test_a_process_that_comes_to_no_kernel_is_told_with_its_last_words() -> None:
    measured = measure(ASKED, GPU)
    assert not measured.tables
    assert not measured.crashes
    assert set(measured.faults) == set(ASKED)
    (reason,) = set(measured.faults.values())
    assert reason.startswith("a process that tried it ended with exit status 1: ")
    assert "Error" in reason


def says(what: str, name: str, said: object) -> str:
    """A line of Python by which a process says something."""
    return f"print({measuring._MARK + json.dumps([what, name, said])!r}, flush=True)"


def table(rows: int) -> KernelTable:
    choice = Choice("dense", (), 1.0)
    return KernelTable(rows, [Bucket(8, choice, [choice])])


def found(name: str, rows: int = 32) -> str:
    return says("table", name, table(rows).to_json())


class Processes:
    """Stands in for the processes that measure: scripts, one after the other."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, *scripts: list[str]
    ) -> None:
        self._folder, self._scripts, self._started = folder, list(scripts), 0
        monkeypatch.setattr(measuring, "start", self.start)

    def start(self) -> measuring.Process:
        file = self._folder / f"{self._started}.json"
        self._started += 1
        reads = [f"open({str(file)!r}, 'w').write(sys.stdin.read())"]
        script = "\n".join(["import sys, time", *reads, *self._scripts.pop(0)])
        command, pipe = [sys.executable, "-c", script], subprocess.PIPE
        return measuring.Process(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    @property
    def asked(self) -> list[dict[str, list]]:
        """What each process was asked for."""
        files = (self._folder / f"{index}.json" for index in range(self._started))
        return [json.loads(file.read_text())["asked"] for file in files]


def test_one_process_measures_all_shapes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = [
        "print('a library says something')",
        says("trying", "first", "mma_sp"),
        says("warning", "", "mma_sp with (1,) is not used"),
        found("first"),
        says("seconds", "first", {"coarse": 0.5}),
        found("second", 48),
    ]
    processes = Processes(monkeypatch, tmp_path, script)
    with caplog.at_level(logging.WARNING):
        measured = measure(ASKED, GPU)
    assert measured.tables == {"first": table(32), "second": table(48)}
    assert (measured.faults, measured.crashes) == ({}, {})
    assert measured.seconds == {"first": {"coarse": 0.5}}
    assert caplog.messages == ["mma_sp with (1,) is not used"]
    assert processes.asked == [{name: list(asked) for name, asked in ASKED.items()}]


def test_after_a_crash_a_new_process_measures_the_rest_without_that_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crashes = [found("first"), says("trying", "second", "mma_sp"), CRASH]
    processes = Processes(monkeypatch, tmp_path, crashes, [found("second")])
    with caplog.at_level(logging.WARNING):
        measured = measure(ASKED, GPU)
    assert set(measured.tables) == set(ASKED)
    reason = "a process that tried it ended with signal SIGILL"
    assert measured.crashes == {("second", "mma_sp"): reason}
    assert processes.asked[1] == {"second": [32, 128, "bfloat16", ["dense"]]}
    size = "weights of shape (32, 128), bfloat16"
    assert caplog.messages == [f"mma_sp is not used for {size}: {reason}"]


def test_a_shape_whose_kernels_all_crash_has_no_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dense, ours = ([says("trying", "first", name), CRASH] for name in BOTH)
    processes = Processes(monkeypatch, tmp_path, dense, ours, [found("second")])
    measured = measure(ASKED, GPU)
    reason = "a process that tried it ended with signal SIGILL"
    assert (set(measured.tables), measured.faults) == ({"second"}, {"first": reason})
    assert len(processes.asked) == 3


def test_a_fault_of_one_shape_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = "no kernel multiplies 1 tokens"
    Processes(monkeypatch, tmp_path, [says("fault", "first", said), found("second")])
    measured = measure(ASKED, GPU)
    assert (set(measured.tables), measured.faults) == ({"second"}, {"first": said})


@pytest.mark.parametrize(
    ("script", "seconds", "told"),
    [
        (found(""), 60, None),
        (CRASH, 60, "ended with signal SIGILL"),
        ("pass", 60, "ended early"),
        ("time.sleep(60)", 1, "had not ended after 2 s"),
    ],
    ids=["good", "crash", "early", "hang"],
)
def test_how_a_process_ended_is_told(
    script: str,
    seconds: int,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    Processes(monkeypatch, tmp_path, [says("trying", "", "mma_sp"), script])
    monkeypatch.setattr(measuring, "TIMEOUT", seconds)
    reason = crash_reason("mma_sp", sparse_weight(32, 128, torch.bfloat16))
    assert reason == (told and f"a process that tried it {told}")


def test_a_process_that_waits_is_used_and_ends_unasked_if_nothing_is_asked() -> None:
    unasked, waiting = measuring.start(), measuring.start()
    assert unasked.communicate("", 120) == ("", "")
    assert unasked.returncode == 0
    measured = measure(ASKED, torch.device("cuda:99"), waiting)
    assert waiting.returncode == 1
    assert set(measured.faults) == set(ASKED)


def test_where_no_process_can_be_started_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full() -> measuring.Process:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(measuring, "start", full)
    reasons = set(measure(ASKED, GPU).faults.values())
    assert len(reasons) == 1
    assert "no process can be started: [Errno 11] Resource temp" in reasons.pop()


class StandInRecording:
    """Stands in for a recording on a card: every call takes 10 microseconds."""

    def __init__(self, calls: object, other: object = None) -> None:
        pass

    def microseconds(self, least: float = 3000.0, fewest: int = 5) -> float:
        return 10.0


def test_what_the_process_says_is_what_is_read(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The process's own work, done here on a CPU."""
    monkeypatch.setattr(tune, "Recording", StandInRecording)
    monkeypatch.setattr(tune, "COLD_BYTES", 0)
    asked = Asked(32, 128, "bfloat16", ["dense"])
    measuring._measure_one("first", asked, torch.device("cpu"))
    measured = measuring.Measured({}, {}, {}, {})
    assert measuring._read(capfd.readouterr().out, measured) == ("first", "dense")
    found = measured.tables["first"]
    assert [bucket.tokens for bucket in found.buckets] == list(BUCKETS)
    assert found.choice(7) == Choice("dense", (), 10.0)
    assert {"check", "coarse", "fine", "other"} <= set(measured.seconds["first"])
