# SPDX-License-Identifier: Apache-2.0
"""What a report reads of evaluations: ``nm_permute/evaluations.json``."""

import math

from nm_permute_plugin.reporting.reading import Count, Read


class Text(Read):
    """One perplexity: see ``evaluation.results.TextResult``."""

    text: str
    form: str
    perplexity: float
    tokens: Count | None = None
    dense: float | None = None
    base: float | None = None
    divergence: float | None = None
    agreement: float | None = None
    flips: float | None = None

    @property
    def title(self) -> str:
        """The text and how it was cut."""
        return f"{self.text}, {self.form}"

    @property
    def gap(self) -> float | None:
        """
        The share of the base's loss in log-perplexity that is regained; None where it is
        not known, or nothing was lost.
        """
        dense, base = self.dense, self.base
        if (
            dense is None
            or base is None
            or not 0 < dense < base
            or self.perplexity <= 0
        ):
            return None
        return math.log(base / self.perplexity) / math.log(base / dense)


class Task(Read):
    """One metric of a task: see ``evaluation.results.TaskResult``."""

    task: str
    metric: str
    value: float
    error: float | None = None
    items: Count | None = None
    dense: float | None = None
    flips: float | None = None

    @property
    def title(self) -> str:
        """The task and the metric."""
        return f"{self.task}, {self.metric}"

    @property
    def recovery(self) -> float | None:
        """The value as a share of the dense model's."""
        return self.value / self.dense if self.dense else None


class Measured(Read):
    """All that was measured of a checkpoint."""

    texts: tuple[Text, ...] = ()
    tasks: tuple[Task, ...] = ()

    @property
    def telling(self) -> Text | None:
        """The newest result on text of those that tell most; None without a dense model."""
        compared = [text for text in self.texts if text.dense]
        with_base = [text for text in compared if text.gap is not None]
        best = with_base or compared
        return best[-1] if best else None
