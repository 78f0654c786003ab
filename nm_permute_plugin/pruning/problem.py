# SPDX-License-Identifier: Apache-2.0
"""What orders are found for: a dense model, the scores of its weights, and samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.pruning.running.loss import LossWeights, check_finite, loss, run
from nm_permute_plugin.pruning.running.masked import Mask, masked
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.stacking import StackedScore
from nm_permute_plugin.pruning.statistics import Batch, on_device


@dataclass
class Learned:
    """
    What learning leaves.

    :param perms: by space, the best orders by the validation samples
    :param multipliers: of the scores, by linear, of every input channel as it was before
        the fold, one row for each of equally long runs of the weight's rows; those that
        belong to ``perms``
    :param history: one entry a look: step, validation loss and, from the first step on,
        training loss and temperature
    """

    perms: dict[str, Permutation]
    multipliers: dict[str, Float[Tensor, "_runs _in"]] = field(default_factory=dict)
    history: list[dict[str, int | float]] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """
    A dense model that is to be pruned in the best order of its channels.

    :param stacks: the scores of all consumers, by space
    :param others: masks of pruned linears whose inputs no space orders, by module
    """

    model: nn.Module
    stacks: Mapping[str, StackedScore]
    others: Mapping[str, Tensor]
    samples: Samples
    pattern: NMPattern

    @property
    def linears(self) -> list[str]:
        """The names of the pruned linears."""
        consumers = [r.name for s in self.stacks.values() for r in s.space.consumers]
        return [*self.others, *consumers]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of masks that need gradients."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the model runs; scores and masks may be elsewhere."""
        return next(self.model.parameters()).device

    def masks(self, found: Learned) -> dict[str, Tensor]:
        """The masks of all linears under orders, in the channels' old places."""
        masks = dict(self.others)
        for name, stack in self.stacks.items():
            masks |= stack.masks(found.perms[name], self.pattern, found.multipliers)
        return masks

    def validation_loss(
        self, found: Learned, weights: LossWeights, teacher: Teacher | None = None
    ) -> float:
        """The loss on the validation samples under orders; see ``mean_loss``."""
        batches = self.samples.validation
        return mean_loss(self.model, self.masks(found), batches, weights, teacher)


def mean_loss(
    model: nn.Module,
    masks: Mapping[str, Mask],
    batches: Sequence[Batch],
    weights: LossWeights,
    teacher: Teacher | None = None,
) -> float:
    """
    The loss of the model under the masks, the mean over the batches.

    :param teacher: the dense model, which runs for every batch by default
    :raises ValueError: if it is not finite
    """
    total = 0.0
    teacher = teacher or Teacher(model, weights, keep=False)
    with torch.no_grad():
        for batch in batches:
            dense = teacher(batch)
            batch = on_device(batch, model)
            with masked(model, masks):
                total += float(loss(run(model, batch, weights), dense, batch, weights))
    return check_finite(total, "validation loss") / len(batches)
