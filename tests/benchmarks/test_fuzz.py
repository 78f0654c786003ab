# SPDX-License-Identifier: Apache-2.0
"""Changed files of every kind are refused in one line, or read as they were written."""

import json
import os
from pathlib import Path

import pytest

import fuzz
import fuzz_changes
import fuzz_forgery
from fuzz_worker import Worker

NAMES = ["sparse-24-bitmask", "resume-state", "recipe", "spec", "plan-cache"]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Fuzz:
    return fuzz.Fuzz(tmp_path_factory.mktemp("fuzz"), NAMES, seed=1)


def test_no_change_does_harm(harness: fuzz.Fuzz) -> None:
    results = [harness.run(case) for case in range(60)]
    failed = [result for result in results if result.failures]
    assert failed == []
    assert {result.subject for result in results} == set(NAMES)
    refused = sum(result.status != 0 for result in results)
    assert 20 < refused < 60
    assert "| all | 60 |" in fuzz.summary(results)


def test_what_is_wrong_is_seen(
    harness: fuzz.Fuzz, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness itself: a reader that believes everything, hangs, or runs code."""
    from fuzz_readers import READERS, Read

    def change(folder: Path, *_: object) -> str:
        (folder / "state").joinpath("changed").mkdir()
        return "state"

    monkeypatch.setattr(fuzz_changes, "change", change)
    mark = str(harness.mark)
    expected = {
        "silently wrong": lambda *_: Read(0, "", made={"0": "another"}),
        "hangs": lambda folder, _: (
            os.mkfifo(folder / "pipe") or (folder / "pipe").read_text()
        ),
        "code was run": lambda *_: os.mkdir(mark) or Read(1, "error: value.json"),
        "memory": lambda *_: Read(0, str(len(b"x" * (400 << 20)))),
        "names no file": lambda *_: Read(1, "error: it is bad"),
        "traceback": lambda *_: Read(1, "", error="Traceback"),
        "left behind: out": lambda *_: Read(1, "error: value.json", left=("out",)),
        "died of 9": lambda *_: os.kill(os.getpid(), 9),
    }
    monkeypatch.setattr("fuzz_worker.SECONDS", 1.0)
    case = NAMES.index("resume-state")
    for failure, reader in expected.items():
        monkeypatch.setitem(READERS, "resume", reader)
        harness.worker = Worker()
        assert failure in harness.run(case).failures


def test_forged_checksums_are_believed(harness: fuzz.Fuzz, tmp_path: Path) -> None:
    from fuzz_readers import weights

    (subject,) = [s for s in harness.subjects if s.name == "sparse-24-bitmask"]
    fuzz_changes.copy(subject.folder, tmp_path / "forged")
    path = tmp_path / "forged" / "model.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start, _ = header["model.norm.weight"]["data_offsets"]
    content[8 + length + start] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        weights(tmp_path / "forged")
    assert fuzz_forgery.forge(tmp_path / "forged")
    changed = weights(tmp_path / "forged")
    right = weights(subject.folder)
    assert {n for n in right if right[n] != changed[n]} == {"model.norm.weight"}
