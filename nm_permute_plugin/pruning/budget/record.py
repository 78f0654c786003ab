# SPDX-License-Identifier: Apache-2.0
"""What a budget left dense, with its figures: before learning, and after it."""

from dataclasses import dataclass, field, replace

EXPONENT = 2 / 3
"""
The loss after learning grows like this power of the loss under the search's masks: less is
left of a large loss. Of SmolLM2, 24 steps: 1.64 -> 1.02 with all sparse, 0.67 -> 0.56 with
35 % dense.
"""


@dataclass(frozen=True)
class GroupFigures:
    """
    One group of linears that serving fuses.

    :param linears: the names of their modules
    :param weights: how many weights they have
    :param share: the part of the loss that their masks are to blame for
    :param stays_dense: whether they were left dense
    :param dense: microseconds of one product, dense; None where no times were given
    :param fastest: the same by the fastest kernel
    """

    linears: tuple[str, ...]
    weights: int
    share: float
    stays_dense: bool
    dense: float | None = None
    fastest: float | None = None


@dataclass(frozen=True)
class Point:
    """
    A choice that was measured.

    :param dense_share: share of the weights that stay dense
    :param validation: the loss on the validation data, before any recovery
    :param speedup: of all products; None where no times were given
    """

    dense_share: float
    validation: float
    speedup: float | None = None


@dataclass(frozen=True)
class BudgetRecord:
    """
    What a budget left dense.

    With ``method: learned`` the choice is made before learning, under the search's masks:
    ``chosen`` and ``curve`` are measured under those, ``learned`` after learning.

    :param goal: the setting that asked for it
    :param asked: its value
    :param dense_loss: the loss of the dense model on the validation data
    :param chosen: the choice that was made
    :param curve: this choice and others in the same order, from all sparse to half dense
    :param learned: every choice for which masks were learned, measured after that; the
        last of them was kept. Empty where nothing is learned
    """

    goal: str
    asked: float
    dense_loss: float
    chosen: Point
    groups: list[GroupFigures] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)
    learned: list[Point] = field(default_factory=list)

    @property
    def reached(self) -> float:
        """The loss on the validation data under the final masks, before any recovery."""
        return (self.learned or [self.chosen])[-1].validation

    @property
    def is_exceeded(self) -> bool:
        """Whether more was lost than ``max_loss_increase`` allows."""
        lost = self.reached - self.dense_loss
        return self.goal == "max_loss_increase" and lost > self.asked

    def expected(self, lost: float) -> float:
        """
        What is expected to be lost after learning, by what this choice lost after it.

        :param lost: by another choice under the search's masks, beside the dense model
        """
        before = self.chosen.validation - self.dense_loss
        after = self.reached - self.dense_loss
        # Learning begins with the search's masks, and ends with none that are worse.
        power: float = (max(lost, 0.0) / before) ** EXPONENT
        return min(lost, after * power)

    def after_learning(self, loss: float) -> "BudgetRecord":
        """The same once the masks were learned of what stays sparse."""
        point = replace(self.chosen, validation=loss)
        return replace(self, learned=[*self.learned, point])

    @property
    def dense_linears(self) -> set[str]:
        """The names of the linears that stay dense."""
        return {n for g in self.groups if g.stays_dense for n in g.linears}
