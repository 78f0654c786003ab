# SPDX-License-Identifier: Apache-2.0
"""
What a report reads: the record of a run, ``nm_permute/report.json``.

Records of older versions have fewer fields; each one that is missing is left out of the
page. What stands in a field must be what belongs there.
"""

from collections.abc import Mapping
from typing import Any

from nm_permute_plugin.reporting.budget import Budget
from nm_permute_plugin.reporting.reading import Count, Read


class Entry(Read):
    """
    One validation of a search, of learning or of a recovery.

    :ivar loss: the mean training loss since the validation before
    :ivar rate: of the learning
    """

    step: Count | None = None
    round: Count | None = None
    validation: float | None = None
    loss: float | None = None
    rate: float | None = None

    @property
    def place(self) -> int:
        """The step or the round."""
        return self.round or 0 if self.step is None else self.step


class Linear(Read):
    """The figures of one linear: see ``pruning.figures.LinearFigures``."""

    name: str
    weights: Count
    score: float
    before: float
    after: float
    exchanged: float
    cost_before: float | None = None
    cost_after: float | None = None


class Crop(Read):
    """A corner of one linear's masks: see ``pruning.figures.Crop``."""

    name: str
    space: str
    channels: tuple[Count, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    was: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether all rows have one length, that of the channels, and there are some."""
        lengths = {len(row) for row in (*self.before, *self.after, *self.was)}
        alike = len(self.before) == len(self.after) == len(self.was)
        return alike and lengths == {len(self.channels)} != {0}


class Figures(Read):
    """What masks keep and change: see ``pruning.figures.Figures``."""

    linears: tuple[Linear, ...] = ()
    crop: Crop | None = None


class Recovered(Read):
    """What one stage of a recovery did: see ``pruning.recover.stages.StageRecord``."""

    stage: str
    validation: tuple[float, float]
    kept: bool
    seconds: float | None = None
    history: tuple[Entry, ...] = ()
    rounded: bool = False


class Run(Read):
    """
    One run, as its record tells it.

    :ivar modifier: the effective settings
    :ivar moved: the spaces whose channels have another order than before
    :ivar retained: the share of the score that the plain masks keep, and those found
    :ivar earlier: the record of the run before, where the model was pruned twice
    """

    base_model: str = "a model"
    modifier: Mapping[str, Any] = {}
    versions: Mapping[str, str] = {}
    environment: Mapping[str, str | int | float] = {}
    pruned: tuple[str, ...] = ()
    moved: tuple[str, ...] | None = None
    fold_error: float | None = None
    retained: tuple[float, float] | None = None
    seconds: Mapping[str, float] = {}
    memory: Mapping[str, Count] = {}
    searched: tuple[Entry, ...] = ()
    history: tuple[Entry, ...] = ()
    recovered: tuple[Recovered, ...] = ()
    figures: Figures = Figures()
    budget: Budget | None = None
    changed_later: bool = False
    earlier: Mapping[str, Any] | None = None

    def setting(self, name: str) -> Any:
        """One of the effective settings; None where the record does not tell it."""
        return self.modifier.get(name)

    @property
    def pattern(self) -> str:
        """The pattern, as 2:4."""
        return str(self.setting("mask_structure") or "N:M")

    @property
    def group(self) -> int:
        """How many neighbours one group of the pattern has; 4 where it is not told."""
        _, _, size = self.pattern.partition(":")
        return int(size) if size.isdecimal() and int(size) else 4

    @property
    def score(self) -> str:
        """The score of the weights; empty where it is not told, as the method."""
        return str(self.setting("score") or "")

    @property
    def method(self) -> str:
        """How permutation and masks were found."""
        return str(self.setting("method") or "")

    @property
    def learned(self) -> tuple[Entry, ...]:
        """The validations of the learning, with steps."""
        return tuple(entry for entry in self.history if entry.step is not None)

    @property
    def rounds(self) -> tuple[Entry, ...]:
        """The validations of the search, with rounds."""
        found = self.searched or self.history
        return tuple(entry for entry in found if entry.round is not None)

    @property
    def losses(self) -> tuple[float | None, float] | None:
        """
        The validation loss of the plain masks and of what the run kept; None where nothing
        was validated.

        Older records of learning begin with what the search had found: of them the loss
        of the plain masks is not known.
        """
        seen = [*self.rounds, *self.learned]
        values = [entry.validation for entry in seen if entry.validation is not None]
        # Losses of rounded weights do not compare with those before.
        for stage in (stage for stage in self.recovered if not stage.rounded):
            values += stage.validation if stage.kept else stage.validation[:1]
        if not values:
            return None
        from_plain = bool(self.rounds) or self.method == "identity"
        return values[0] if from_plain else None, min(values)

    @property
    def permuted(self) -> bool:
        """Whether channels moved; where that is not told, whether they could."""
        return self.method != "identity" if self.moved is None else bool(self.moved)

    @property
    def minutes(self) -> float | None:
        """The time of all stages."""
        return sum(self.seconds.values()) / 60 if self.seconds else None
