# SPDX-License-Identifier: Apache-2.0
"""What was measured of a checkpoint, kept beside it in ``nm_permute/evaluations.json``."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nm_permute_plugin._files import read_json, write_text
from nm_permute_plugin.checkpoint.record import FOLDER

FILE = f"{FOLDER}/evaluations.json"

R = TypeVar("R", bound=BaseModel)

ROUNDING = 1e-3
"""Values that differ by this share at most are one: sums are added in another order."""


class _Measured(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextResult(_Measured):
    """
    Perplexity on a text, and how near the predictions are to the dense model's.

    :ivar text: the name of the text
    :ivar form: how it was cut, such as "windows of 2048 tokens"
    :ivar tokens: how many tokens were predicted
    :ivar dense: the dense model's perplexity on the same windows
    :ivar base: the perplexity of the checkpoint that was pruned without a permutation
    :ivar divergence: mean KL divergence from the dense model, nats a token
    :ivar agreement: share of the tokens whose most likely next token is the dense model's
    :ivar flips: share of the tokens where one of the two predicts the text's next token
        first and the other does not
    """

    text: str
    form: str
    tokens: int
    perplexity: float
    dense: float | None = None
    base: float | None = None
    divergence: float | None = None
    agreement: float | None = None
    flips: float | None = None


class TaskResult(_Measured):
    """
    One metric of one task of lm-eval, 0 to 1 where the metric is an accuracy.

    :ivar items: how many were asked
    :ivar flips: share of the items that one of the two answers rightly and the other not
    :ivar higher_is_better: false of perplexities and other losses
    """

    task: str
    metric: str
    value: float
    error: float | None = None
    items: int | None = None
    dense: float | None = None
    dense_error: float | None = None
    flips: float | None = None
    higher_is_better: bool = True

    @property
    def recovery(self) -> float | None:
        """The value as a share of the dense model's, where more is better."""
        if not self.dense or not self.higher_is_better:
            return None
        return self.value / self.dense


class Evaluations(_Measured):
    """All that was measured of a checkpoint, the newest of each kind."""

    texts: tuple[TextResult, ...] = ()
    tasks: tuple[TaskResult, ...] = ()

    def with_text(self, new: TextResult) -> "Evaluations":
        """These results and another, in place of one of the same text and form."""
        texts = _replaced(self.texts, new, ("text", "form"), ("tokens", "perplexity"))
        return self.model_copy(update={"texts": texts})

    def with_task(self, new: TaskResult) -> "Evaluations":
        """These results and another, in place of one of the same task and metric."""
        tasks = _replaced(self.tasks, new, ("task", "metric"), ("items", "value"))
        return self.model_copy(update={"tasks": tasks})


def _replaced(
    results: tuple[R, ...], new: R, key: Sequence[str], value: Sequence[str]
) -> tuple[R, ...]:
    """
    The results with a new one in place of that with its key.

    What the new one was not compared with, as with a dense model, stays from the old one
    where both measured the same.
    """

    def alike(old: R, names: Sequence[str]) -> bool:
        return all(_same(getattr(old, name), getattr(new, name)) for name in names)

    fields = {name: of for name, of in new if of is not None}
    for old in results:
        if alike(old, key) and alike(old, value):
            new = old.model_copy(update=fields)
    return (*(old for old in results if not alike(old, key)), new)


def _same(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=ROUNDING)
    return one == other


def read_evaluations(checkpoint: Path) -> Evaluations:
    """
    What was measured of a checkpoint; nothing if there is no such file.

    :raises ValueError: for a file that does not hold results
    """
    path = checkpoint / FILE
    if not path.exists():
        return Evaluations()
    try:
        return Evaluations.model_validate(read_json(path))
    except (OSError, ValueError) as error:
        said = str(error)
        if isinstance(error, ValidationError):
            said = error.errors()[0]["msg"]
        raise ValueError(
            f"{path} holds no results of an evaluation ({said}); remove it, or "
            "measure again"
        ) from None


def write_evaluations(checkpoint: Path, results: Evaluations) -> None:
    """Write ``nm_permute/evaluations.json``, whole or not at all."""
    path = checkpoint / FILE
    path.parent.mkdir(exist_ok=True)
    write_text(path, results.model_dump_json(indent=1, exclude_none=True) + "\n")
