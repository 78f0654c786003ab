# SPDX-License-Identifier: Apache-2.0
"""Of what others write into a directory meanwhile nothing is lost."""

import errno
import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
from directories import KEPT, content_of, everything, fill

from nm_permute_plugin.checkpoint import transaction


@pytest.mark.parametrize("there", ["nothing", "empty"])
@pytest.mark.parametrize("name", ["config.json", "weights"])
def test_two_runs_into_one_folder(tmp_path: Path, there: str, name: str) -> None:
    target = tmp_path / "target"
    if there == "empty":
        target.mkdir()

    def second() -> None:
        with transaction.directory(target) as fresh:
            fill(fresh)
            with transaction.directory(target) as faster:
                (faster / name).write_text("first")

    refused = rf"target was written .*\({name}\).* is in .*target-2"
    with pytest.raises(FileExistsError, match=refused):
        second()
    assert content_of(tmp_path) == {
        f"target/{name}": "first",
        "target-2/config.json": "new",
        "target-2/weights": "new",
    }


@pytest.mark.parametrize("mount", [False, True], ids=["renamed", "filled"])
def test_two_runs_over_one_old_result(
    target: Path, monkeypatch: pytest.MonkeyPatch, mount: bool
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: mount and path == target)

    def second() -> None:
        with transaction.directory(target, everything) as fresh:
            fill(fresh)
            with transaction.directory(target, everything) as faster:
                (faster / "config.json").write_text("first")

    with pytest.raises(FileExistsError, match=r"\(config.json\)"):
        second()
    aside = (target if mount else target.parent) / "target-2"
    assert content_of(aside) == {"config.json": "new", "weights": "new"}
    found = content_of(target)
    expected = KEPT | {"config.json": "first"}
    del expected["weights"]
    assert {name: found[name] for name in expected} == expected
    assert len(found) == len(expected) + 2 * mount


@pytest.mark.parametrize("mount", [False, True], ids=["renamed", "filled"])
def test_what_appears_meanwhile_stays(
    target: Path, monkeypatch: pytest.MonkeyPatch, mount: bool
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: mount and path == target)
    with transaction.directory(target) as fresh:
        fill(fresh)
        (target / "late.txt").write_text("late")
        (target / "more" / "late").write_text("late")
    assert content_of(target) == {
        "config.json": "new",
        "weights": "new",
        "late.txt": "late",
        "more/file": "old",
        "more/late": "late",
    }
    assert list(target.parent.iterdir()) == [target]


def test_what_appears_in_a_folder_that_was_not_there_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with transaction.directory(target) as fresh:
        fill(fresh)
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    expected = {"config.json": "new", "weights": "new", "notes.txt": "mine"}
    assert content_of(target) == expected


def test_what_appears_before_the_work_begins_stays(target: Path) -> None:
    """It was empty when it was looked at, and the work began a little later."""

    def late() -> None:
        with transaction.directory(target, was_empty=True) as fresh:
            fill(fresh)

    before = content_of(target)
    with pytest.raises(FileExistsError, match=r"\(config.json\)"):
        late()
    assert content_of(target) == before


def test_what_appears_at_the_last_moment_stays(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing of the old folder and its going away, two files appear."""
    rename = Path.rename

    def late(self: Path, to: Path) -> Path:
        if self == target:
            (target / name).write_text("late")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", late)
    name = "late.txt"
    with transaction.directory(target) as fresh:
        fill(fresh)
    assert content_of(target)["late.txt"] == "late"
    name = "weights"

    def again() -> None:
        with transaction.directory(target) as fresh:
            fill(fresh)

    with pytest.raises(FileExistsError, match=r"\(weights\)"):
        again()
    assert content_of(target)["weights"] == "late"
    assert content_of(target)["config.json"] == "new"


# Without locks, of what is there twice replaced at the same moment lies in `.out.*.old`.
@pytest.mark.parametrize(
    ("there", "locks"),
    [
        ("nothing", True),
        ("empty", True),
        ("old", True),
        ("nothing", False),
        ("empty", False),
    ],
)
def test_of_many_runs_at_the_same_moment_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, locks: bool
) -> None:
    if not locks:  # as on some network file systems
        monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK)))
    runs, rounds = 4, 8
    barrier = threading.Barrier(runs, timeout=60)

    def run(target: Path, number: int) -> bool:
        try:
            with transaction.directory(target, everything) as fresh:
                for name in ("config.json", "weights"):
                    (fresh / name).write_text(str(number))
                barrier.wait()
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(runs) as pool:
        for number in range(rounds):
            folder = tmp_path / str(number)
            target = folder / "out"
            folder.mkdir()
            if there != "nothing":
                target.mkdir()
            if there == "old":
                (target / "notes.txt").write_text("mine")
                (target / "config.json").write_text("old")
            done = list(pool.map(run, [target] * runs, range(runs)))
            assert sum(done) == 1
            content = content_of(target)
            assert content["config.json"] == content["weights"] == str(done.index(True))
            assert content.get("notes.txt") == ("mine" if there == "old" else None)
            found = [(made / "weights").read_text() for made in folder.iterdir()]
            assert sorted(found) == [str(number) for number in range(runs)]
