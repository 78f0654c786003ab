# SPDX-License-Identifier: Apache-2.0
"""A directory appears whole or not at all, on every kind of file system."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from directories import KEPT, content_of, everything, fill
from safetensors.torch import save_file

from nm_permute_plugin.checkpoint import disk, transaction


def test_a_new_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with transaction.directory(target) as fresh:
        fill(fresh)
        assert not target.exists()
        assert transaction.is_unfinished(fresh)
    assert content_of(tmp_path) == {"a/b/config.json": "new", "a/b/weights": "new"}


def test_nothing_of_the_old_stays_unless_it_is_kept(target: Path) -> None:
    with transaction.directory(target, lambda name: name != "more") as fresh:
        fill(fresh)
    expected = {name: text for name, text in KEPT.items() if name != "more/file"}
    assert content_of(target) == expected
    with transaction.directory(target) as fresh:
        fill(fresh)
    assert content_of(target) == {"config.json": "new", "weights": "new"}
    assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_the_old_as_it_was(target: Path) -> None:
    before = content_of(target)

    def interrupted() -> None:
        with transaction.directory(target) as fresh:
            fill(fresh)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content_of(target) == before
    assert list(target.parent.iterdir()) == [target]


def test_what_a_killed_run_left_is_cleared_away(target: Path) -> None:
    left = transaction.unfinished(target, "mark")
    left.mkdir()
    (left / "half").write_text("x")
    with transaction.directory(target, everything, "mark") as fresh:
        assert fresh == left
        fill(fresh)
    assert content_of(target) == KEPT


def test_files_are_copied_where_they_cannot_be_linked(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, to: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    (target / "link").symlink_to("nowhere")
    monkeypatch.setattr(os, "link", refuse)
    with transaction.directory(target, everything) as fresh:
        fill(fresh)
    assert content_of(target) == KEPT
    assert os.readlink(target / "link") == "nowhere"


def test_a_target_that_cannot_be_renamed_is_filled(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == target)
    inode = target.stat().st_ino
    with transaction.directory(target, everything) as fresh:
        assert fresh.parent == target
        fill(fresh)
    assert content_of(target) == KEPT
    with transaction.directory(target, lambda name: name == "more") as fresh:
        (fresh / "config.json").write_text("newer")
    assert content_of(target) == {"config.json": "newer", "more/file": "old"}
    assert target.stat().st_ino == inode


def test_a_link_to_another_file_is_not_written_through(target: Path) -> None:
    with transaction.directory(target) as fresh:
        disk.take(target, fresh, everything, link=True)
        disk.write_json(fresh / "config.json", {})
        assert (target / "config.json").read_text() == "old"
    assert (target / "config.json").read_text() == "{}\n"


def test_what_may_not_be_replaced_is_refused(target: Path, tmp_path: Path) -> None:
    disk.refuse_occupied(tmp_path / "new")
    disk.refuse_occupied(target, overwrite=True)
    with pytest.raises(FileExistsError, match="target exists and is not an empty fold"):
        disk.refuse_occupied(target)
    with pytest.raises(FileExistsError, match=r"notes.txt exists and is not an empty"):
        disk.refuse_occupied(target / "notes.txt", overwrite=True)


WRITER = """
import os, signal, sys
from pathlib import Path
from nm_permute_plugin.checkpoint import transaction
target = Path(sys.argv[1])
with transaction.directory(target) as outer, transaction.directory(outer) as inner:
    (outer / "weights").write_text("half")
    (inner / "weights").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def writer(target: Path) -> subprocess.Popen[str]:
    """A process that stands in the middle of writing a directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "target"
    process = writer(target)
    process.kill()
    process.wait()
    (tmp_path / ".target.b.0123abcd.unfinished").mkdir()  # another target's
    assert len(list(tmp_path.iterdir())) == 3
    with transaction.directory(target) as fresh:
        fill(fresh)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".target.b.0123abcd.unfinished", "target"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    process = writer(target)
    try:
        with transaction.directory(target) as fresh:
            fill(fresh)
        assert len([p for p in tmp_path.iterdir() if p != target]) == 2
    finally:
        process.kill()
        process.wait()


def test_a_directory_that_another_process_writes_under_the_same_mark_is_refused(
    tmp_path: Path,
) -> None:
    target = tmp_path / "target"
    with transaction.directory(target, mark="saved") as fresh:
        with (
            pytest.raises(FileExistsError, match="another process writes"),
            transaction.directory(target, mark="saved"),
        ):
            pass
        fill(fresh)
    assert content_of(target) == {"config.json": "new", "weights": "new"}


def test_a_target_that_was_moved_aside_by_a_killed_process_comes_back(
    target: Path,
) -> None:
    old = content_of(target)
    aside = target.with_name(".target.0123abcd.old")
    target.rename(aside)
    transaction.clear_abandoned(target)
    assert content_of(target) == old
    assert not aside.exists()
    (aside / "more").mkdir(parents=True)
    transaction.clear_abandoned(target)
    assert content_of(target) == old
    assert not aside.exists()


def test_weights_may_be_read_by_whom_the_directory_may(target: Path) -> None:
    # the safetensors package makes files that only their owner may read
    with transaction.directory(target) as fresh:
        (fresh / "more").mkdir()
        for name in ("model.safetensors", "more/permutations.safetensors"):
            save_file({"x": torch.zeros(4)}, fresh / name)
        (fresh / "plain").write_text("")
    modes = {oct(p.stat().st_mode) for p in target.rglob("*") if p.is_file()}
    assert modes == {oct((target / "plain").stat().st_mode)}


def test_a_file_system_without_modes_and_links_takes_a_directory(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for exFAT, and for file systems of users, which cannot be had in a test."""
    real = os.fsync

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def sync_files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    for name in ("link", "chmod", "utime", "setxattr"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(os, "fsync", sync_files_alone)
    with transaction.directory(target, everything) as fresh:
        fill(fresh)
        save_file({"x": torch.zeros(4)}, fresh / "model.safetensors")
        disk.take(target, fresh, everything)
    assert content_of(target).keys() == {*KEPT, "model.safetensors"}


def test_a_file_that_cannot_be_written_to_disk_is_an_error(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = content_of(target)
    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(OSError, match="Input/output error"),
        transaction.directory(target) as fresh,
    ):
        fill(fresh)
    assert content_of(target) == before
    assert list(target.parent.iterdir()) == [target]


def test_everything_that_is_new_is_written_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    real = os.fsync

    def note(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with transaction.directory(tmp_path / "a" / "b" / "target") as fresh:
        fill(fresh)
        (fresh / "more").mkdir()
        (fresh / "more" / "file").write_text("new")
    found = [tmp_path, *tmp_path.rglob("*")]
    assert [path for path in found if path.stat().st_ino not in synced] == []
