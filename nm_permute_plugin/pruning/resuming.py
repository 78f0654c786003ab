# SPDX-License-Identifier: Apache-2.0
"""
A run that died goes on: what it found, and where it stood, is kept in a folder.

A run that goes on does everything again, in the same order, but takes what was found
from the folder: so it gives what it would have given had nobody disturbed it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from loguru import logger

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.state_folder import (
    PROGRESS,
    StateFolder,
    set_generators,
)

T = TypeVar("T")

_current: ContextVar[StateFolder | None] = ContextVar("_current", default=None)


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
    run = StateFolder(Path(folder).resolve())
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
            set_generators(generators)
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
            self._run.write(PROGRESS, what, self._key, value)
