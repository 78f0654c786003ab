# SPDX-License-Identifier: Apache-2.0
"""The folder of a run's state: what the run was given, what it found, where it stands."""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch
from loguru import logger

from nm_permute_plugin._words import file_size
from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.state_files import (
    bytes_of,
    read_about,
    read_value,
    write_value,
)

T = TypeVar("T")

EVERY = 120.0
"""Seconds of training after which its state is written."""

SHARE = 0.02
"""The most of the time that writing takes: where it is slow, it is done less often."""

PROGRESS, _GIVEN, _FOUND, _LOCK = "progress", "given", "found_", "lock"

_NAMES = re.compile(
    rf"{_LOCK}|\.?({PROGRESS}|{_GIVEN}|{_FOUND}[0-9a-f]+)(\.[0-9a-z]+\.(unfinished|old))?"
)
"""What a run writes into its folder, and what a process that was killed leaves of it."""


class StateFolder:
    """
    The folder of a run's state, which no other process may use meanwhile.

    :param folder: a resolved path; of several ranks the first one alone uses it
    :raises FileExistsError: if another process uses it at the moment
    :raises OSError: if it cannot be made
    :raises ValueError: if it holds something else
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_refused = self.goes_on = False
        self._reserve = 0
        self._writes = True
        self._took, self._last = 0.0, time.monotonic()
        self._inside: list[set[Path]] = []
        self._lock: int | None = None
        if not ranks.is_first():
            self._writes = False
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write to {folder}: {error.strerror}") from error
        self._refuse_foreign()
        # Not the folder itself: what is written into it locks that for a moment.
        self._lock = lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise FileExistsError(
                f"another process prunes with the state in {folder} at the moment: wait "
                "for it, or name another folder"
            ) from error
        except OSError:
            pass  # not every file system has locks

    def clear(self) -> None:
        """Remove all state from the folder."""
        if self._lock is None:
            return
        for path in self.folder.iterdir():
            if _NAMES.fullmatch(path.name) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Let others use the folder, and remove it if it holds nothing worth keeping."""
        if self._lock is None:
            return
        if not self._found() and not (self.folder / PROGRESS).is_dir():
            self.clear()
            (self.folder / _LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
        os.close(self._lock)

    def where(self) -> str | None:
        """Say from where a run goes on; None from its start."""
        if self._lock is None:
            return None
        if (self.folder / PROGRESS).is_dir():
            return f"from {self._about(PROGRESS)['what']}"
        found = self._found()
        if not found:
            return None
        newest = max(found, key=lambda path: path.stat().st_mtime_ns)
        return f"from the finished {self._about(newest.name)['what']}"

    def expect(self, given: Mapping[str, object], reserve: int) -> None:
        """
        See that the state is of a run that was given the same.

        :param reserve: bytes of the disk that stay free for the checkpoint
        :raises ValueError: if it was given something else, saying what
        """
        self._reserve = reserve
        ranks.of_first(lambda: self._expect(_flat(given)))

    def _expect(self, now: dict[str, str]) -> None:
        if (self.folder / _GIVEN).is_dir():
            different = list(_differences(self._read(_GIVEN), now))
            if different:
                self.is_refused = True
                raise ValueError(
                    f"{self.folder} holds the state of another run: "
                    f"{', '.join(different)}; give what that run was given, or start "
                    "anew with --fresh (fresh=True)"
                )
        else:
            self.write(_GIVEN, "", "", now)

    def kept(self, make: Callable[[], object], what: str, key: str) -> object:
        """What was made for a key, or is made now and then kept."""
        digest = blake2b(f"{what} {key}".encode(), digest_size=12).hexdigest()
        name = _FOUND + digest
        if self._inside:
            self._inside[-1].add(self.folder / name)
        if ranks.of_first((self.folder / name).is_dir):
            generators, value = ranks.of_first(lambda: self._read(name))
            set_generators(generators)
            logger.info(f"Taken from {self.folder}: the {what}")
            return value
        parts: set[Path] = set()
        self._inside.append(parts)
        try:
            value = make()
        finally:
            self._inside.pop()
        if self.write(name, what, "", (_generators(), value)):
            # It was made from these, which nobody asks for again.
            for path in (*parts, self.folder / PROGRESS):
                shutil.rmtree(path, ignore_errors=True)
        return value

    def progress(self, key: str) -> Any:
        """What a loop wrote last; None if it was not this one."""
        folder = self.folder / PROGRESS
        if not folder.is_dir() or self._about(PROGRESS)["key"] != key:
            return None
        return self._read(PROGRESS)

    def is_due(self) -> bool:
        """Whether the last write is so long ago that another one costs little."""
        pause = max(EVERY, self._took / SHARE)
        return time.monotonic() - self._last >= pause

    def write(self, name: str, what: str, key: str, value: object) -> bool:
        """Write a value, if there is room for it and for the checkpoint; tell whether."""
        started = time.monotonic()
        if not self._writes:
            return False
        if name == PROGRESS:
            value = _generators(), value
        free, size = shutil.disk_usage(self.folder).free, bytes_of(value)
        about = {"what": what, "key": key}
        try:
            if free < size + self._reserve:
                raise OSError(
                    f"the disk has {file_size(free)} free, of which the checkpoint may "
                    f"need {file_size(self._reserve)} and the state {file_size(size)}"
                )
            write_value(self.folder / name, value, about)
        except OSError as error:
            self._writes = False
            logger.warning(
                f"The run's state is not kept any more in {self.folder}: {error}; a run "
                "that dies starts again from what is there"
            )
            return False
        self._last = time.monotonic()
        self._took = self._last - started
        return True

    def _refuse_foreign(self) -> None:
        names = sorted(path.name for path in self.folder.iterdir())
        foreign = [name for name in names if not _NAMES.fullmatch(name)]
        if foreign:
            raise ValueError(
                f"{self.folder} holds what is no state of a run ({foreign[0]}): name "
                "another folder"
            )

    def _found(self) -> list[Path]:
        return list(self.folder.glob(f"{_FOUND}*"))

    def _about(self, name: str) -> dict[str, str]:
        return self._readable(read_about, name)

    def _read(self, name: str) -> Any:
        return self._readable(read_value, name)

    def _readable(self, read: Callable[[Path], T], name: str) -> T:
        try:
            return read(self.folder / name)
        except (OSError, ValueError) as error:
            self.is_refused = True
            raise ValueError(
                f"{error}; start anew with --fresh (fresh=True)"
            ) from error


def _generators() -> list[torch.Tensor]:
    """The states of torch's random generators: of the CPU, and of the GPU in use."""
    of_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *of_gpu]


def set_generators(states: list[torch.Tensor]) -> None:
    try:
        torch.set_rng_state(states[0])
        if torch.cuda.is_initialized():
            for state in states[1:]:
                torch.cuda.set_rng_state(state)
    except (LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"value.json holds no state of random generators ({error}): start anew with "
            "--fresh (fresh=True)"
        ) from error


def _flat(given: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """What was given as one level of words; settings by their dotted names."""
    flat: dict[str, str] = {}
    for name, value in given.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


def _differences(then: Any, now: Mapping[str, str]) -> Iterator[str]:
    then = then if isinstance(then, dict) else {}
    for name in dict.fromkeys([*then, *now]):
        before, after = then.get(name, "none"), now.get(name, "none")
        if before != after:
            yield f"{name} {_short(before)} there, {_short(after)} here"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
