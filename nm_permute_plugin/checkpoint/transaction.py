# SPDX-License-Identifier: Apache-2.0
"""Put a whole directory in another's place, or leave the other as it is."""

import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def directory(
    source: Path, target: Path, without: Collection[str], overwrite: bool = False
) -> Iterator[Path]:
    """
    A new directory to fill, which takes the target's place once it is complete.

    It begins with the source's files. When the block ends with an error it is removed,
    and the target is what it was.

    :param source: may be the target itself
    :param without: file names of the source that are not taken along
    :param overwrite: replace a target that is not the source and not empty
    :raises FileExistsError: if the target holds something and may not be replaced
    """
    in_place = source == target
    if target in source.parents:
        raise ValueError(f"{target} holds {source}; write somewhere else")
    if target.is_file():
        raise FileExistsError(f"{target} is a file; name a directory")
    occupied = target.exists() and any(target.iterdir())
    if occupied and not (in_place or overwrite):
        raise FileExistsError(f"{target} is not empty; name another, or overwrite it")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.new"
    try:
        fresh.mkdir()
        for entry in source.iterdir():
            if entry.name not in without:
                _take(entry, fresh / entry.name, link=in_place)
        yield fresh
        _sync(fresh)
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file anew; one of that name that is linked elsewhere stays."""
    path.unlink(missing_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _take(entry: Path, to: Path, link: bool) -> None:
    if entry.is_dir():
        shutil.copytree(entry, to, copy_function=os.link if link else shutil.copy2)
    elif link and not entry.is_symlink():
        os.link(entry, to)
    else:
        shutil.copy2(entry, to)


def _swap(fresh: Path, target: Path) -> None:
    """The target is missing only between the two renames; an error undoes the first."""
    if not target.exists():
        fresh.rename(target)
        return
    old = fresh.with_suffix(".old")
    target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the directory's entries on disk before it takes another's place."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
