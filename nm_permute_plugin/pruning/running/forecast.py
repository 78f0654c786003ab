# SPDX-License-Identifier: Apache-2.0
"""Say once, after the first steps of a long loop, how long the rest will take."""

import time

from loguru import logger
from tqdm import tqdm

from nm_permute_plugin.pruning.running.cuda_graph import EAGER_CALLS
from nm_permute_plugin.pruning.settings import Settings

WARM_UPS = EAGER_CALLS + 1
"""Steps that are not timed: on a GPU the first ones compile and are captured."""

TIMED = 2
"""Steps that are."""


class Forecast:
    """
    Times the first steps of a loop, and logs how long the others will take.

    :param what: is done, for the log
    :param steps: of the loop, and of a later one with steps like them
    :param validations: in both
    :param of_validation: seconds that one takes
    """

    def __init__(
        self, what: str, steps: int, validations: int, of_validation: float
    ) -> None:
        self._what, self._steps = what, steps
        self._validations, self._of_validation = validations, of_validation
        self._done, self._since = 0, 0.0

    @classmethod
    def of_training(
        cls, settings: Settings, done: int, of_validation: float
    ) -> "Forecast":
        """
        Of learning and of the recovery end to end, whose steps are alike.

        :param done: the steps that are behind it already
        """
        spans = [steps for _, steps in settings.learn.schedule()]
        what, recover = "learning", settings.recover
        if settings.budget.goal == "max_loss_increase":
            what += " (and again if that loses more than the budget allows)"
        if "end_to_end" in recover.stages:
            spans.append(recover.end_to_end.steps)
            what += " and the recovery end_to_end"
        left = validations = 0
        for steps in spans:
            to_come = max(0, steps - done)
            done = max(0, done - steps)
            left += to_come
            validations += -(-to_come // settings.validation.interval(steps))
        return cls(what, left, validations, of_validation)

    def step(self) -> None:
        """Count a step, and log once enough of them have been timed."""
        self._done += 1
        if self._done == WARM_UPS:
            self._since = time.perf_counter()
        if self._done == WARM_UPS + TIMED:
            left = self._steps - self._done
            of_step = (time.perf_counter() - self._since) / TIMED
            seconds = left * of_step + self._validations * self._of_validation
            with tqdm.external_write_mode():  # beside the bar of the loop
                logger.info(
                    f"About {duration(seconds)} more for {self._what}: {left} steps of "
                    f"{duration(of_step)}, {self._validations} validations of "
                    f"{duration(self._of_validation)}"
                )


def duration(seconds: float) -> str:
    """
    Write a time as people say it.

    >>> duration(0.21), duration(42.0), duration(250.0), duration(9000.0)
    ('0.2 s', '42 s', '4.2 minutes', '2.5 hours')
    """
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"
