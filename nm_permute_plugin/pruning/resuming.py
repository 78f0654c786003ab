# SPDX-License-Identifier: Apache-2.0
"""
A run that died goes on: what it found, and where it stood, is kept in a folder.

A run that goes on does everything again, in the same order, but takes what was found
from the folder: so it gives what it would have given had nobody disturbed it.
"""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

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


@contextmanager
def resuming(folder: str | Path, fresh: bool = False) -> Iterator[None]:
    """
    Keep what a run finds in a folder, so that it can go on after it died.

    The statistics, the search, and every finished stage of learning and recovery are
    kept, and every two minutes the state of the stage that trains, at an interrupt as
    well. When the block is entered again, the run goes on from there and gives the same
    weights. The folder is removed when the block ends well, so save inside of it:

    >>> import nm_permute_plugin as nmp
    >>> with nmp.resuming("OUT.state"):  # doctest: +SKIP
    ...     pruned = nmp.prune(model, data, nmp.Settings(method="learned"))
    ...     nmp.save(model, "OUT", pruned)

    ``oneshot`` with a recipe may take the place of the two lines. Of several ranks the
    first one reads and writes the folder. One run fits into a
    block: another model, other data or other settings are refused by ``prune``.

    :param fresh: forget what the folder holds
    :raises FileExistsError: if another process uses the folder at the moment
    :raises OSError: if the folder cannot be made
    :raises ValueError: if the folder holds something else
    """
    run = _Run(Path(folder).resolve())
    token = _current.set(run)
    try:
        if fresh:
            run.clear()
        where = run.where()
        run.goes_on = ranks.of_first(lambda: where is not None)
        if where:
            logger.info(f"The run goes on {where}, as {run.folder} holds it")
        yield
        run.clear()
    except BaseException:
        where = None if run.is_refused else run.where()
        if where:
            logger.warning(
                f"What was found is kept in {run.folder}. The same command goes on {where}"
            )
        raise
    finally:
        _current.reset(token)
        run.close()


def is_resuming() -> bool:
    """Whether what is found is kept in a folder."""
    return _current.get() is not None


def goes_on() -> bool:
    """Whether a run that died goes on, and does not do everything."""
    run = _current.get()
    return run is not None and run.goes_on


def kept(make: Callable[[], T], what: str, *known_by: object) -> T:
    """
    What ``make`` makes, or what it made for the same ``known_by`` before the run died.

    :param make: makes dicts, lists and tuples of tensors, numbers and words
    :param what: is made, in words
    :param known_by: words and numbers
    """
    run = _current.get()
    return make() if run is None else cast("T", run.kept(make, what, repr(known_by)))


def expect(given: Mapping[str, object], model_bytes: int) -> None:
    """
    See that the folder holds the state of a run that was given the same.

    :param given: to the run, by name: words, numbers, and dicts of those
    :param model_bytes: the bytes of the model, which its checkpoint needs on the disk
    :raises ValueError: if a run was given something else, saying what
    """
    run = _current.get()
    if run is not None:
        run.expect(given, model_bytes)


class Progress:
    """
    Where a training loop stands, written now and then while ``resuming`` lasts.

    A context: where an interrupt ends it, or another rank that died, the state is written
    as well.

    :param what: is going on, in words
    :param known_by: words and numbers, of the loop's start
    :param keeps: false writes nothing: a run that dies takes the loop from its start
    :ivar value: what ``follow``'s function gave when the run died; None if it did not
    :ivar done: the updates that are behind it
    :ivar losses: those of training, of the updates since the list was cleared
    :ivar rate: the learning rate of the last update
    """

    def __init__(self, what: str, *known_by: object, keeps: bool = True) -> None:
        self._run = _current.get() if keeps else None
        self._what, self._key = what, repr((what, known_by))
        self._state: Callable[[], object] | None = None
        self._updating = False
        self.value: Any = None
        self.done, self.rate = 0, float("nan")
        self.losses: list[float] = []
        run = self._run
        found = None if run is None else ranks.of_first(lambda: run.progress(self._key))
        if found is not None:
            generators, value = found
            _set_generators(generators)
            self.done, self.rate, self.losses, self.value = value
            logger.info(f"Going on from step {self.done} of {what}")

    def follow(self, state: Callable[[], object]) -> None:
        """Write from now on what a function gives; it is called between two updates."""
        self._state = state

    @contextmanager
    def update(self, number: int, loss: float, rate: float) -> Iterator[None]:
        """
        Make an update of that number, after which the state is another one.

        :param loss: of training, before the update
        """
        self._updating = True  # an interrupt would leave half of it
        yield
        self.done, self.rate = number, rate
        self.losses.append(loss)
        self._updating = False

    def bar(self, numbers: range, what: str) -> ranks.Bar:
        """
        Make a bar of updates that begins where the run stands; ``update`` moves it.

        :param numbers: of all updates
        """
        behind = len(range(numbers[0], self.done + 1))
        return ranks.bar(desc=what, total=len(numbers), initial=behind)

    def keep(self) -> None:
        """Write the state if it is time to."""
        if self._run is not None and self._run.is_due():
            self._write()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        # The others wait in vain for a rank that has died.
        interrupted |= ranks.count() > 1 and isinstance(error, RuntimeError)
        if interrupted and self.done and not self._updating:
            self._write()

    def _write(self) -> None:
        if self._run is not None and self._state is not None:
            value = self.done, self.rate, self.losses, self._state()
            what = f"step {self.done} of {self._what}"
            self._run.write(_PROGRESS, what, self._key, value)


_PROGRESS, _GIVEN, _FOUND, _LOCK = "progress", "given", "found_", "lock"

_NAMES = re.compile(
    rf"{_LOCK}|\.?({_PROGRESS}|{_GIVEN}|{_FOUND}[0-9a-f]+)(\.[0-9a-z]+\.(unfinished|old))?"
)
"""What a run writes into its folder, and what a process that was killed leaves of it."""


class _Run:
    """The folder of a run's state, which no other process may use meanwhile."""

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
        if not self._found() and not (self.folder / _PROGRESS).is_dir():
            self.clear()
            (self.folder / _LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
        os.close(self._lock)

    def where(self) -> str | None:
        """Say from where a run goes on; None from its start."""
        if self._lock is None:
            return None
        if (self.folder / _PROGRESS).is_dir():
            return f"from {self._about(_PROGRESS)['what']}"
        found = self._found()
        if not found:
            return None
        newest = max(found, key=lambda path: path.stat().st_mtime_ns)
        return f"from the finished {self._about(newest.name)['what']}"

    def expect(self, given: Mapping[str, object], reserve: int) -> None:
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
        digest = blake2b(f"{what} {key}".encode(), digest_size=12).hexdigest()
        name = _FOUND + digest
        if self._inside:
            self._inside[-1].add(self.folder / name)
        if ranks.of_first((self.folder / name).is_dir):
            generators, value = ranks.of_first(lambda: self._read(name))
            _set_generators(generators)
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
            for path in (*parts, self.folder / _PROGRESS):
                shutil.rmtree(path, ignore_errors=True)
        return value

    def progress(self, key: str) -> Any:
        """What a loop wrote last; None if it was not this one."""
        folder = self.folder / _PROGRESS
        if not folder.is_dir() or self._about(_PROGRESS)["key"] != key:
            return None
        return self._read(_PROGRESS)

    def is_due(self) -> bool:
        pause = max(EVERY, self._took / SHARE)
        return time.monotonic() - self._last >= pause

    def write(self, name: str, what: str, key: str, value: object) -> bool:
        """Write a value, if there is room for it and for the checkpoint; tell whether."""
        started = time.monotonic()
        if not self._writes:
            return False
        if name == _PROGRESS:
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


_current: ContextVar[_Run | None] = ContextVar("_current", default=None)


def _generators() -> list[torch.Tensor]:
    """The states of torch's random generators: of the CPU, and of the GPU in use."""
    of_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *of_gpu]


def _set_generators(states: list[torch.Tensor]) -> None:
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
