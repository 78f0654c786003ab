# SPDX-License-Identifier: Apache-2.0
"""What a server keeps for the next one is whole, its own, and in the named folder."""

import os
import tempfile
from pathlib import Path

import pytest

from nm_permute_plugin.serving import cache


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))
    return tmp_path


def test_the_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(cache.FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "nm-permute"
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "own"))
    assert cache.folder() == tmp_path / "own"


def test_a_user_without_a_home_has_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under any number."""
    for name in (cache.FOLDER, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    number = 123_456_789
    monkeypatch.setattr(os, "getuid", lambda: number)
    assert cache.folder() == Path(tempfile.gettempdir()) / f"nm-permute-{number}"


def test_what_a_server_that_died_left_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "abc.tmp", tmp_path / "def.tmp"
    for part in (old, new):
        part.touch()
    os.utime(old, (0, 0))
    cache.keep(tmp_path / "table.json", b"{}", "kernel table")
    assert sorted(os.listdir(tmp_path)) == ["def.tmp", "table.json"]


class Compiler:
    """Stands in for NVIDIA's compiler: it makes the same bytes, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return b"machine code"


def test_machine_code_is_compiled_once(folder: Path) -> None:
    compiler = Compiler()
    for _ in range(3):
        assert cache.machine_code("a.cubin", compiler) == b"machine code"
    assert compiler.calls == 1
    cache.machine_code("b.cubin", compiler)
    assert compiler.calls == 2
    assert sorted(os.listdir(folder)) == ["a.cubin", "b.cubin"]


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "change",
    [
        _flipped,
        _pipe,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.chmod(0o666),
    ],
    ids=["a flipped bit", "a pipe", "cut short", "empty", "others may write it"],
)
def test_machine_code_that_is_not_whole_or_not_ours_is_compiled_again(
    change, folder: Path
) -> None:
    compiler = Compiler()
    cache.machine_code("a.cubin", compiler)
    change(folder / "a.cubin")
    for _ in range(2):
        assert cache.machine_code("a.cubin", compiler) == b"machine code"
    assert compiler.calls == 2


def test_machine_code_of_another_user_is_not_believed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler()
    cache.machine_code("a.cubin", compiler)
    found = os.stat(folder / "a.cubin")
    other = os.stat_result((*found[:4], 12345, *found[5:]))
    monkeypatch.setattr(os, "fstat", lambda descriptor: other)
    assert cache.machine_code("a.cubin", compiler) == b"machine code"
    assert compiler.calls == 2


def test_where_nothing_can_be_kept_machine_code_is_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "file"))
    assert cache.machine_code("a.cubin", Compiler()) == b"machine code"
    assert "could not keep the machine code in" in caplog.text
