# SPDX-License-Identifier: Apache-2.0
"""A disk that is full is told before the work, or ends it and leaves nothing."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import assert_one_error, listing, nm_permute, prune

from nm_permute_plugin.checkpoint import disk


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of a megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def sparse(ready: list[str], tmp_path: Path, text_file: Path) -> Path:
    """A checkpoint of ours."""
    assert prune(tmp_path, "--text", text_file).exit_code == 0
    return tmp_path / "out"


def fill(folder: Path, left: int) -> None:
    (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - left))


def test_a_conversion_that_cannot_fit_is_refused_before_the_work(
    sparse: Path, small: Path
) -> None:
    fill(small, 16 << 10)
    result = nm_permute("convert", sparse, small / "dense", "--format", "dense")
    assert_one_error(result, r"free, and .*dense takes [\d.]+ [kM]B: make room")
    assert listing(small) == ["filler"]


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    sparse: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = disk.refuse_full

    def then_fill(target: Path, needed: int) -> None:
        real(target, needed)
        fill(small, 16 << 10)

    monkeypatch.setattr(disk, "refuse_full", then_fill)
    result = nm_permute("convert", sparse, small / "dense", "--format", "dense")
    assert_one_error(result, r"could not be written to .*No space left on device")
    assert listing(small) == ["filler"]


def test_oneshot_that_fills_the_disk_leaves_nothing(
    ready: list[str], small: Path, tmp_path: Path, run_oneshot, monkeypatch
) -> None:
    from nm_permute_plugin.modifiers import save as modifiers_save

    real = modifiers_save.save_checkpoint

    def fill_first(*arguments: object, **options: object) -> None:
        fill(small, 16 << 10)
        real(*arguments, **options)

    monkeypatch.setattr(modifiers_save, "save_checkpoint", fill_first)
    recipe = (tmp_path / "recipe.yaml").read_text()
    with pytest.raises(OSError, match=r"cannot write .*(No space left|os error 28)"):
        run_oneshot(tmp_path / "dense", recipe, small / "out")
    assert listing(small) == ["filler"]


def test_an_adapter_that_cannot_fit_leaves_nothing(tmp_path: Path, small: Path) -> None:
    fill(small, 4 << 10)
    with pytest.raises(OSError, match="make room"):
        disk.refuse_full(small / "a" / "b", 8 << 10)
    disk.refuse_full(small / "a" / "b", 1 << 10)
    assert os.listdir(small) == ["filler"]
