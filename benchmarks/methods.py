# SPDX-License-Identifier: Apache-2.0
"""How a method that the benchmark compares is set, changed and run."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from pydantic import ValidationError
from torch import nn

from host import sparsegpt
from nm_permute_plugin.pruning.budget.record import BudgetRecord
from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.pipeline import permute_and_prune
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import resolve
from unfolded import own_spaces
from ways import METHODS, RECOVERIES, SPARSEGPT, WAYS, Fields

ALL = "all"
"""In a change of settings: every method that reads the setting."""


@dataclass(frozen=True)
class Change:
    """
    One setting of some methods that is not the default.

    :param method: a name in ``METHODS``, or one in ``WAYS`` that stands for itself with any
        recovery after it, or ``ALL``
    :param path: the names that lead to the setting, from the outermost on
    """

    method: str
    path: tuple[str, ...]
    value: object

    @classmethod
    def parse(cls, text: str) -> "Change":
        """
        A change as it is written on the command line, its value as in a recipe.

        :raises ValueError: for a text of another form, or a method that there is not

        >>> Change.parse("amd.learn.published.temperature=[1.0, 0.05]")
        Change(method='amd', path=('learn', 'published', 'temperature'), value=[1.0, 0.05])
        """
        target, sign, value = text.partition("=")
        method, *path = target.split(".")
        if not sign or not path or method not in (ALL, *METHODS):
            raise ValueError(
                f"{text!r} changes no setting; write METHOD.PATH=VALUE, as in "
                f"learned.learn.multipliers.rate=0.02, METHOD one of {ALL}, "
                f"{', '.join(METHODS)}"
            )
        return cls(method, tuple(path), yaml.safe_load(value))

    @property
    def fields(self) -> Fields:
        """The setting, nested."""
        fields: object = self.value
        for name in reversed(self.path):
            fields = {name: fields}
        assert isinstance(fields, dict)
        return fields

    def __str__(self) -> str:
        return f"{self.method}.{'.'.join(self.path)}={self.value}"


def for_all(values: Mapping[str, object]) -> list[Change]:
    """
    Changes of all methods that read them, such as ``{"learn.steps": 300}``.

    A value that is None leaves the default.
    """
    return [
        Change(ALL, tuple(path.split(".")), value)
        for path, value in values.items()
        if value is not None
    ]


def changes_of(
    names: Sequence[str], short: Mapping[str, object], texts: Iterable[str]
) -> list[Change]:
    """
    The changes that a command line asks for.

    :param names: the methods that will run
    :param short: what options of their own say, as for ``for_all``
    :param texts: what ``--set`` says, which replaces the others
    :raises ValueError: for a text that changes nothing that one of the methods reads
    """
    asked = [Change.parse(text) for text in texts]
    changes = [*for_all(short), *asked]
    read = [change for name in names for change in _settings_and_read(name, changes)[1]]
    for change in asked:
        if change not in read:
            raise ValueError(
                f"--set {change}: nothing in {', '.join(names)} reads this setting"
            )
    return changes


@dataclass(frozen=True)
class Variant:
    """
    A method with one setting of its own beside those that all methods of a run share.

    :ivar name: of the method, then the setting's last word and its value
    """

    method: str
    change: Change | None = None

    @property
    def name(self) -> str:
        if self.change is None:
            return self.method
        return f"{self.method}, {self.change.path[-1]} {self.change.value}"

    @property
    def changes(self) -> list[Change]:
        return [] if self.change is None else [self.change]


def variants_of(
    names: Sequence[str], changes: Sequence[Change], texts: Iterable[str]
) -> list[Variant]:
    """
    Every method as it is, and once more for every value of the settings to vary.

    :param changes: those that all methods share
    :param texts: what ``--vary`` says: a change as in ``--set``, whose value is the list of
        values
    :raises ValueError: for a text that is no such change, or that no method reads
    """
    asked = [Change.parse(text) for text in texts]
    found, read = [], set()
    for name in names:
        found.append(Variant(name))
        for number, change in enumerate(asked):
            if not isinstance(change.value, list):
                raise ValueError(
                    f"--vary {change}: give a list of values, as in [1, 2]"
                )
            for value in change.value:
                one = Change(change.method, change.path, value)
                if one in _settings_and_read(name, [*changes, one])[1]:
                    found.append(Variant(name, one))
                    read.add(number)
    for number, change in enumerate(asked):
        if number not in read:
            raise ValueError(
                f"--vary {change}: nothing in {', '.join(names)} reads this setting"
            )
    return found


def settings_of(name: str, changes: Sequence[Change] = ()) -> Settings:
    """
    The settings of a method.

    :param changes: later ones replace earlier ones; what the method would not read stays as
        it is
    :raises ValueError: for a setting that there is not, or a value that it cannot have
    """
    settings, _ = _settings_and_read(name, changes)
    return settings


def is_random(method: str) -> bool:
    """Whether a method's outcome depends on the seed."""
    return method not in ("magnitude", "wanda", "ria")


@dataclass(frozen=True)
class Outcome:
    """
    What a method did to a model, with its cost.

    :param batches: of text that were trained on
    :param settings: all that the run was given
    :param budget: what stays dense, and the validation loss before and after learning
    """

    seconds: float
    batches: int
    settings: dict[str, object]
    stages: dict[str, float] = field(default_factory=dict)
    fold_error: float | None = None
    retained: tuple[float, float] | None = None
    recovered: list[dict[str, object]] = field(default_factory=list)
    history: list[dict[str, int | float]] = field(default_factory=list)
    budget: dict[str, object] | None = None


def prune(
    model: nn.Module, folder: Path, name: str, data: Data, settings: Settings
) -> Outcome:
    """
    Run a method: the model is pruned in place.

    :param folder: where the model was loaded from
    :param settings: those of the method, from ``settings_of``
    """
    started = time.perf_counter()
    if name == SPARSEGPT:
        sparsegpt(model, folder, data.train, settings.pattern)
        return Outcome(time.perf_counter() - started, 0, {})
    way, then = _parts(name)
    folded, linears = WAYS[way].folded, prunable(model)
    resolved = own_spaces(model, linears)
    if folded:
        resolved = resolve(
            model, spec_of(model), settings.pattern, linears, head_dim_of(model.config)
        )
    record = permute_and_prune(model, resolved, linears, data, settings)
    if then == SPARSEGPT:
        sparsegpt(model, folder, data.train, settings.pattern)
    return Outcome(
        time.perf_counter() - started,
        _batches(settings, data, record.budget),
        settings.model_dump(mode="json"),
        record.seconds,
        record.fold_error if folded else None,
        record.retained,
        [asdict(stage) for stage in record.recovered],
        record.history,
        None if record.budget is None else _told(record.budget),
    )


def prunable(model: nn.Module) -> list[str]:
    """The linears that are pruned: all but the head."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def _told(budget: BudgetRecord) -> dict[str, object]:
    """The figures of a budget, without every group's."""
    return {
        "chosen": asdict(budget.chosen),
        "all_sparse": budget.curve[0].validation,
        "reached": budget.reached,
        "learned": [asdict(point) for point in budget.learned],
    }


def _batches(settings: Settings, data: Data, budget: BudgetRecord | None) -> int:
    """The batches that a run trains on."""
    recover, count = settings.recover, 0
    if settings.method == "learned":
        learnings = 1 if budget is None else len(budget.learned)
        count += learnings * sum(steps for _, steps in settings.learn.schedule())
    if "blocks" in recover.stages:
        count += recover.blocks.epochs * len(data.train)
    if "end_to_end" in recover.stages:
        count += recover.end_to_end.steps
    return count


def _parts(name: str) -> tuple[str, str]:
    """The way of a method, and what follows it; nothing, perhaps."""
    way, _, then = name.partition("+")
    if name == f"learned+{SPARSEGPT}":
        way = "learned-order"  # SparseGPT scores the weights itself
    return way, then


def _settings_and_read(
    name: str, changes: Sequence[Change]
) -> tuple[Settings, list[Change]]:
    """The settings of a method, and the changes that it reads."""
    way, then = _parts(name)
    base: Fields = {"method": "identity"} if name == SPARSEGPT else WAYS[way].settings
    if then in RECOVERIES:
        base = _overlaid(base, {"recover": {"stages": RECOVERIES[then]}})
    elif then == SPARSEGPT:
        base = _overlaid(base, {"prune": False})
    read = [change for change in changes if change.method in (ALL, way, name)]
    while True:
        fields = base
        for change in read:
            fields = _overlaid(fields, change.fields)
        try:
            return Settings.model_validate(fields), read
        except ValidationError as error:
            group = _unread_group(error)
            rest = [c for c in read if c.path[: len(group)] != group] if group else read
            if len(rest) == len(read):
                raise
            read = rest


def _unread_group(error: ValidationError) -> tuple[str, ...]:
    """The path of the settings that were refused because nothing reads them."""
    found = re.search(r"([\w.]+) is set, and nothing reads it", str(error))
    return tuple(found[1].split(".")) if found else ()


def _overlaid(below: Fields, above: Fields) -> Fields:
    """The fields below, with those above in their place, group by group."""
    found = dict(below)
    for name, value in above.items():
        old = found.get(name)
        is_group = isinstance(old, Mapping) and isinstance(value, Mapping)
        found[name] = _overlaid(old, value) if is_group else value
    return found
