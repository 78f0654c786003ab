# SPDX-License-Identifier: Apache-2.0
"""The best of the solutions that learning passes, and the one that a stage begins with."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nm_permute_plugin.pruning.problem import Solution
from nm_permute_plugin.pruning.resuming import Progress
from nm_permute_plugin.pruning.search import History

if TYPE_CHECKING:
    from nm_permute_plugin.pruning.learn.loop import Learner


class Best:
    """
    The best solution by the validation loss, among those that were shown.

    :ivar seconds: that the first validation took
    :ivar history: one entry a validation: its step, the validation loss and, from the first
        step on, the mean training loss of the steps since the validation before, and the
        rate of its step
    """

    def __init__(
        self,
        start: Solution,
        validate: Callable[[Solution], float],
        callback: Callable[[int, "Learner"], object] = lambda step, learner: None,
    ) -> None:
        self._validate, self._callback = validate, callback
        before = time.perf_counter()
        self.solution, self.loss = start, validate(start)
        self.seconds = time.perf_counter() - before
        self.history: History = [{"step": 0, "validation": self.loss}]

    def consider(
        self, step: int, training: float, rate: float, learner: "Learner"
    ) -> None:
        """Validate what a learner holds, and keep it if it is better than all before."""
        self._callback(step, learner)
        solution = learner.solution()
        loss = self._validate(solution)
        if loss < self.loss:
            self.loss, self.solution = loss, solution
        self.history.append(
            {"step": step, "validation": loss, "loss": training, "rate": rate}
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "solution": self.solution.state_dict(),
            "loss": self.loss,
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.solution = Solution(**state["solution"])
        self.loss, self.history = state["loss"], state["history"]


def begin_of(numbers: range, best: Best, progress: Progress) -> Solution | None:
    """
    The solution with which a stage of those steps begins: the best so far.

    A stage in which a run died began with what was the best then, and ``best`` gets what
    it held when it died; the stages before have none.
    """
    kept = progress.value
    if kept is None or numbers[0] > kept["first"]:
        return best.solution
    if numbers[0] < kept["first"]:
        return None
    best.load_state_dict(kept["best"])
    return Solution(**kept["begin"])
