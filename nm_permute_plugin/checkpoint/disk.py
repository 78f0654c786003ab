# SPDX-License-Identifier: Apache-2.0
"""Files on the disk: is there room for them, copy or link them, write them through."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from nm_permute_plugin._words import file_size

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


def nearest(path: Path) -> Path:
    """Returns a path, or the nearest of its parents that exists."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def refuse_full(target: Path, needed: int) -> None:
    """
    Checks that the disk can hold what is going to be written beside a target.

    :param needed: bytes
    :raises OSError: if it cannot
    """
    parent = nearest(target)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the disk of {parent} has {file_size(free)} free, and {target} takes "
            f"{file_size(needed)}: make room, or name a folder on another disk",
        )


def refuse_occupied(target: Path, overwrite: bool = False) -> None:
    """
    Checks that a directory may be put at a path, and that it can.

    :param overwrite: allow a directory that holds something
    :raises OSError: if it may not or can not
    """
    empty = target.is_dir() and (overwrite or not any(target.iterdir()))
    if target.exists() and not empty:
        raise FileExistsError(
            f"{target} exists and is not an empty folder; name another"
        )
    if os.path.ismount(target):
        raise OSError(f"{target} is a mount point; name a folder inside of it")


def copy_file(
    source: str | Path, to: str | Path, *, follow_symlinks: bool = True
) -> None:
    """Copies a file, with its time and mode where the file system has them."""
    shutil.copyfile(source, to, follow_symlinks=follow_symlinks)
    with suppress(OSError):
        shutil.copystat(source, to, follow_symlinks=follow_symlinks)


def take(
    source: Path, fresh: Path, keep: Callable[[str], bool], link: bool = False
) -> None:
    """
    Takes along entries of a directory, except names that are there already.

    :param keep: says which are taken along, by name
    :param link: link files instead of copying them, where the file system can; for a
        source that will be replaced
    """
    for entry in source.iterdir():
        to = fresh / entry.name
        if not os.path.lexists(to) and keep(entry.name):
            _take(entry, to, link)


def _take(entry: Path, to: Path, link: bool) -> None:
    if entry.is_dir() and not (link and entry.is_symlink()):
        to.mkdir()
        for inside in entry.iterdir():
            _take(inside, to / inside.name, link)
    elif link:
        _link(entry, to)
    else:
        copy_file(entry, to)


def _link(source: str | Path, to: str | Path) -> None:
    try:
        if not os.path.islink(source):
            os.link(source, to)
            return
    except OSError:
        pass  # not every file system has hard links
    copy_file(source, to, follow_symlinks=False)
    sync(Path(to))


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes a JSON file anew; a file that is linked to the old one stays as it is."""
    path.unlink(missing_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def share(path: Path, folder: Path) -> None:
    """Lets everyone read weights who may read the directory: safetensors lets nobody."""
    if path.suffix == ".safetensors" and not path.is_symlink():
        with suppress(OSError):  # not every file system has modes
            path.chmod(path.stat().st_mode | folder.stat().st_mode & 0o666)


def copy_mode(old: Path, new: Path) -> None:
    with suppress(OSError):  # not every file system has modes
        shutil.copymode(old, new)


def sync(path: Path) -> None:
    """Writes a file, or a directory's entries, to disk before anything is renamed."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Not every file system writes folders to disk when it is asked to.
        if path.is_file() or error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
