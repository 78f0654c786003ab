# SPDX-License-Identifier: Apache-2.0
"""Let a directory appear whole or not at all: whatever writes a checkpoint does it here."""

import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from nm_permute_plugin.checkpoint.disk import copy_mode, share, sync, take

_UNFINISHED = ".unfinished"
_OLD = ".old"
_STATE = ".nm_permute_state"

_State = dict[str, tuple[int, ...]]
"""What of a directory changes when something is written, by path."""


@contextmanager
def directory(
    target: Path,
    keep: Callable[[str], bool] | None = None,
    mark: str | None = None,
    was_empty: bool = False,
) -> Iterator[Path]:
    """
    Yields a new, empty directory, which takes the target's place when the block ends.

    What was written is on disk before that. If the block raises, the new directory is
    removed and the target stays what it was. What a process that was killed has left of
    its own is removed first. What appears in the target meanwhile is never lost: it stays
    beside the new files, or, where one of them has its name, the target stays and the new
    directory gets another name.

    :param target: a resolved path
    :param keep: says which entries of an existing target stay, by name, where the new
        directory has none of that name; by default none does
    :param mark: names the new directory, for processes that write to it together; by
        default the name is unique
    :param was_empty: whether the target has been seen to be missing or empty, so that all
        that it holds has appeared since
    :raises OSError: if the directory cannot be made, naming its parent, or another
        process writes to it
    :raises FileExistsError: if something else wrote the same files to the target
        meanwhile, naming where the new directory is now
    """
    before = {} if was_empty else _state(target)
    made = [parent for parent in target.parents if not parent.exists()]
    made += [parent.parent for parent in made[-1:]]
    fresh = unfinished(target, mark or uuid.uuid4().hex[:8])
    lock = _make(fresh, target)
    try:
        yield fresh
        for folder, _, files in os.walk(fresh):
            for name in (*files, "."):
                share(Path(folder, name), fresh)
                sync(Path(folder, name))
        with _one_at_a_time(fresh.parent):
            _put(fresh, target, keep or (lambda name: False), before)
        for place in (target, *made, target.parent):
            sync(place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make(fresh: Path, target: Path) -> int | None:
    """Makes and locks the new directory; returns the lock, None where there are none."""
    try:
        fresh.parent.mkdir(parents=True, exist_ok=True)
        # Nobody shall find the new directory before it is locked.
        with _one_at_a_time(fresh.parent):
            clear_abandoned(target)
            if not fresh.exists():
                fresh.mkdir()
                return _lock(fresh)
    except OSError as error:
        raise OSError(f"cannot write to {fresh.parent}: {error.strerror}") from error
    raise FileExistsError(
        f"another process writes {target} at the moment (to {fresh}); wait for it, or "
        "name another folder"
    )


def clear_abandoned(target: Path) -> None:
    """
    Removes what processes that were killed have left beside a target, or inside of it.

    A process holds a lock on its new directory for as long as it lives. One that was
    killed between the two renames that put a directory in its place left the target
    under another name: it gets its own back.
    """
    parent = unfinished(target, "any").parent
    if not parent.is_dir():
        return
    name = re.escape(target.name)
    new = re.compile(rf"\.+{name}(\.[0-9a-z]+{re.escape(_UNFINISHED)})+")
    old = re.compile(rf"\.{name}\.[0-9a-z]+{re.escape(_OLD)}")
    for path in sorted(parent.iterdir()):
        if new.fullmatch(path.name) and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
    for path in sorted(parent.iterdir()):
        if not old.fullmatch(path.name) or path.with_suffix(_UNFINISHED).exists():
            continue
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)


def unfinished(target: Path, mark: str) -> Path:
    """
    Returns where a target is written until it is finished: beside it.

    A target that cannot be renamed, a mounted volume say, is written inside of itself.
    """
    fixed = os.path.ismount(target) or not os.access(target.parent, os.W_OK)
    parent = target if target.is_dir() and fixed else target.parent
    return parent / f".{target.name}.{mark}{_UNFINISHED}"


def state_beside(target: Path) -> Path | None:
    """
    Returns where a run that writes a target keeps its state until the target stands.

    It is None where nothing can be beside the target, and the state would fill it.
    """
    parent = unfinished(target, "any").parent
    return None if parent == target else parent / f".{target.name}{_STATE}"


def is_unfinished(path: Path) -> bool:
    """Tells whether a path is the new directory of a transaction that goes on."""
    return path.name.startswith(".") and path.suffix == _UNFINISHED


def final_name(path: Path) -> str:
    """
    Tells what a directory will be called when its transaction ends.

    >>> final_name(Path("models/.tiny-2of4.0a1b2c3d.unfinished"))
    'tiny-2of4'
    """
    found = re.fullmatch(rf"\.+(.+?)(\.[0-9a-z]+{re.escape(_UNFINISHED)})+", path.name)
    return path.name if found is None else found[1]


def _lock(folder: Path) -> int | None:
    """Locks a directory for this process; returns None where file systems have no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_abandoned(folder: Path) -> bool:
    """Tells whether no process writes to a directory; not sure is no."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    lock = _lock(folder)
    if lock is None:
        return False
    os.close(lock)
    return True


def _state(folder: Path) -> _State:
    """Notes what a directory holds: by path, what changes when a file is written."""
    state: _State = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_unfinished(Path(name))]
        for name in (*folders, *files):
            path = Path(parent, name)
            try:
                stat = path.lstat()
            except FileNotFoundError:
                continue  # it is gone again
            written = () if name in folders else (stat.st_mtime_ns, stat.st_size)
            state[str(path.relative_to(folder))] = (stat.st_ino, *written)
    return state


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Lets other processes wait that put something into the same directory."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _appeared(now: _State, before: _State) -> set[str]:
    """Names the entries of a directory that hold something new or written since."""
    return {Path(path).parts[0] for path in now if now[path] != before.get(path)}


def _put(
    fresh: Path, target: Path, keep: Callable[[str], bool], before: _State
) -> None:
    """
    Puts the new directory in the target's place.

    The target is missing only between two renames, and an error undoes the first.
    """
    inside = fresh.parent == target
    if not inside and _replaces_nothing(fresh, target):
        return
    seen = _state(target)
    appeared = _appeared(seen, before)
    _refuse_written(fresh, target, appeared)
    if inside:
        _refill(fresh, target, lambda name: name in appeared or keep(name))
        return
    copy_mode(target, fresh)
    ours = {entry.name for entry in fresh.iterdir()}
    take(target, fresh, lambda name: name in appeared or keep(name), link=True)
    old = fresh.with_suffix(_OLD)
    target.rename(old)
    try:
        late = _appeared(_state(old), seen)  # from here on nobody finds it by its name
        if not late & ours:
            take(old, fresh, late.__contains__, link=True)
            fresh.rename(target)
    except OSError as error:
        if not _replaces_nothing(old, target):
            raise FileExistsError(
                f"{target} was written by something else at the same moment; what it "
                f"held before is in {old}"
            ) from error
        raise
    if late & ours:
        old.rename(target)
        _refuse_written(fresh, target, late & ours)
    shutil.rmtree(old, ignore_errors=True)


def _replaces_nothing(fresh: Path, target: Path) -> bool:
    """Puts the new directory where nothing is, or an empty one, if it is so."""
    if target.exists():
        if any(target.iterdir()):
            return False
        copy_mode(target, fresh)
    try:
        fresh.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False  # somebody was faster
        raise
    return True


def _refuse_written(fresh: Path, target: Path, appeared: set[str]) -> None:
    """Refuses to replace what was written meanwhile; what was made gets a free name."""
    taken = sorted(entry.name for entry in fresh.iterdir() if entry.name in appeared)
    if not taken:
        return
    for number in count(2):
        aside = fresh.parent / f"{target.name}-{number}"
        if not aside.exists() and _replaces_nothing(fresh, aside):
            break
    raise FileExistsError(
        f"{target} was written by something else while this ran ({', '.join(taken)}): it "
        f"stays as it is, and what was made here is in {aside}"
    )


def _refill(fresh: Path, target: Path, keep: Callable[[str], bool]) -> None:
    """Fills a target that cannot be renamed; config.json leaves first and comes last."""
    new = {entry.name for entry in fresh.iterdir()}
    for entry in sorted(target.iterdir(), key=lambda e: e.name != "config.json"):
        if is_unfinished(entry) or (entry.name not in new and keep(entry.name)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    for name in sorted(new, key="config.json".__eq__):
        (fresh / name).rename(target / name)
