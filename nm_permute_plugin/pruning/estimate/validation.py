# SPDX-License-Identifier: Apache-2.0
"""What a validation takes: masks of all linears, and a pass of the validation data."""

from dataclasses import dataclass

from torch import Tensor

from nm_permute_plugin.pruning.estimate.amounts import Amounts
from nm_permute_plugin.pruning.estimate.meter import Meter, Took
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.running.masked import Mask
from nm_permute_plugin.pruning.running.teacher import Teacher


@dataclass(frozen=True)
class Validation:
    """
    :param masks: the time that the masks of all linears take
    :param passing: that of the validation data under masks
    :param dense: what the dense model takes for the validation data the first time
    """

    masks: Took
    passing: Took
    dense: Took

    @classmethod
    def measure(
        cls, problem: Problem, solution: Solution, amounts: Amounts, meter: Meter
    ) -> "Validation":
        """Measure one validation batch twice: the dense model runs the first time."""
        problem.masks(solution)  # warms up
        masks, of_masks = meter.took(lambda: problem.masks(solution))
        dense, again = passes(problem.teacher, masks, amounts, meter)
        return cls(of_masks, again, dense)

    def of(self, count: float | int) -> Took:
        """The time of so many validations."""
        return (self.masks + self.passing) * count


def passes(
    teacher: Teacher,
    masks: dict[str, Tensor] | dict[str, Mask],
    amounts: Amounts,
    meter: Meter,
) -> tuple[Took, Took]:
    """
    What the dense model takes for all validation data once, and what a pass of them takes
    each time.
    """
    batch, count = amounts.validation, amounts.validation_batches

    def run() -> float:
        return teacher.validate(masks, [batch])

    _, first = meter.took(run)
    _, later = meter.took(run)
    return first.less(later) * count, later * count
