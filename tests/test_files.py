# SPDX-License-Identifier: Apache-2.0
"""Files that anybody may have made are read with doubt."""

import os
from pathlib import Path

import pytest
import yaml

from nm_permute_plugin import _files


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [pipe, device, folder, loop])
@pytest.mark.parametrize("read", [_files.read_json, lambda p: _files.read_yaml(p, "r")])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make, read) -> None:
    make(tmp_path / "odd")
    with pytest.raises(OSError, match="odd"):
        read(tmp_path / "odd")


def test_a_hole_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"hole has 1,099,511,627,776 bytes"):
        _files.read_json(tmp_path / "hole")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is no JSON: .*recursion"),
        ("[" + "{}," * 1_000_000 + "0]", "holds so many values"),
        ('{"a": ' + "1" * 5000 + "}", "is no JSON"),
        ("{", "is no JSON"),
    ],
    ids=["deep", "wide", "a number of 5,000 digits", "cut off"],
)
def test_json_that_would_do_harm_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json {message}"):
        _files.read_json(tmp_path / "a.json")


LAUGHS = "\n".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9) if level else 1}]"
    for level in range(12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "its aliases make more than 100,000 values"),
        ("a: &a [*a]", "its aliases make more than"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested deeper than 100"),
        ("a: 1\na: 2", "'a' stands twice"),
        ("a: 2026-99-99", "month must be in 1..12"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: \x00", "special characters"),
        ("a: {b", "expected"),
        ("? [x]\n: 1\n", "unhashable"),
    ],
)
def test_yaml_that_would_do_harm_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"recipe .*a\.yaml is no YAML: .*{message}"):
        _files.read_yaml(tmp_path / "a.yaml", "recipe")


def test_yaml_with_aliases_is_read_as_ever(tmp_path: Path) -> None:
    text = "a: &a {x: [1, 're:[a-z]{2}']}\nb: *a\nc: {<<: *a, y: 2}\n"
    (tmp_path / "a.yaml").write_text(text)
    read = _files.read_yaml(tmp_path / "a.yaml", "recipe")
    assert read == (text, yaml.safe_load(text))
    (tmp_path / "a.yaml").write_text("")
    assert _files.read_yaml(tmp_path / "a.yaml", "recipe") == ("", None)


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _files.write_text(tmp_path / "a", "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        _files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
