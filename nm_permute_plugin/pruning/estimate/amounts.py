# SPDX-License-Identifier: Apache-2.0
"""How much of everything a run does: batches, validations, steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from nm_permute_plugin.pruning.data import Batch, Data, first_sample
from nm_permute_plugin.pruning.problem import SpaceScores
from nm_permute_plugin.pruning.search import ROUNDS_BETWEEN_VALIDATIONS
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.pruning.statistics import first_samples


def size(batch: Batch) -> int:
    """Tokens of a batch with its padding, or the numbers of its images."""
    return batch["input_ids" if "input_ids" in batch else "pixel_values"].numel()


@dataclass(frozen=True)
class Amounts:
    """
    The work of a run, counted in batches of the size of the largest.

    :ivar batch: the largest training batch, which is measured
    :ivar validation: the largest validation batch
    """

    data: Data
    settings: Settings

    @cached_property
    def batch(self) -> Batch:
        return max(self.data.train, key=size)

    @cached_property
    def validation(self) -> Batch:
        return max(self.data.validation, key=size)

    @cached_property
    def row(self) -> Batch:
        """The first sample of ``batch``."""
        return first_sample(self.batch)

    @property
    def rows(self) -> int:
        """How many samples ``batch`` has."""
        return round(size(self.batch) / size(self.row))

    @property
    def rows_at_a_time(self) -> int:
        """How many samples of a batch go through the model at a time in a step."""
        return min(self.rows, self.settings.memory.micro_batch_size or self.rows)

    @cached_property
    def train_batches(self) -> float:
        """All training data, in batches like ``batch``."""
        return sum(map(size, self.data.train)) / size(self.batch)

    @cached_property
    def validation_batches(self) -> float:
        """All validation data, in batches like ``validation``."""
        return sum(map(size, self.data.validation)) / size(self.validation)

    @property
    def per_step(self) -> float:
        """The mean training batch, in batches like ``batch``."""
        return self.train_batches / len(self.data.train)

    @cached_property
    def sensitivity_rows(self) -> float:
        """Samples that measure the sensitivity of outputs, in samples like ``row``."""
        return sum(map(size, first_samples(self.data.train))) / size(self.row)

    @property
    def steps(self) -> int:
        """Steps of learning, of a layer with ``objective: layer_wise``."""
        return sum(steps for _, steps in self.settings.learn.schedule())

    def validations(self, steps: int) -> int:
        """How often such a stage is validated: in between, and after the last step."""
        return -(-steps // self.settings.validation.interval(steps))

    @property
    def measured_passes(self) -> float:
        """
        Forward passes of ``row`` that measuring all stages takes, roughly.

        A backward pass counts as two; the assignments of the search are left out.
        """
        learned = self.settings.method == "learned"
        stages = len(self.settings.learn.stages) if learned else 0
        recover = self.settings.recover.stages
        trained = stages + ("end_to_end" in recover)
        judged = (self.settings.method != "identity") + bool(recover)
        of_validation = size(self.validation) / size(self.row)
        return 7 + (1 + 10 * trained) * self.rows + 3 * judged * of_validation

    @property
    def measured_masks(self) -> int:
        """How often measuring makes the masks of all linears, or sorts as much, roughly."""
        learned = self.settings.method == "learned"
        return 6 + (12 * len(self.settings.learn.stages) if learned else 0)

    @property
    def search_rounds(self) -> int:
        """Rounds of assignment, up to the last validation."""
        every = ROUNDS_BETWEEN_VALIDATIONS
        return -(-self.settings.search.rounds // every) * every

    def search_validations(self, spaces: Mapping[str, SpaceScores]) -> int:
        """How often the search validates: all spaces, and each family of them alone."""
        families = len({of.space.family for of in spaces.values()})
        looks = self.search_rounds // ROUNDS_BETWEEN_VALIDATIONS
        return 1 + looks * (1 + (families if families > 1 else 0))
