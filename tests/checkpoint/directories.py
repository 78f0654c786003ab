# SPDX-License-Identifier: Apache-2.0
"""A directory to write, and what is in one."""

from pathlib import Path


def everything(name: str) -> bool:
    return True


def content_of(folder: Path) -> dict[str, str]:
    """The text of every file, by its path in the folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def fill(fresh: Path) -> None:
    for name in ("config.json", "weights"):
        (fresh / name).write_text("new")


KEPT = {"config.json": "new", "weights": "new", "notes.txt": "old", "more/file": "old"}
