# SPDX-License-Identifier: Apache-2.0
"""What the choice under a budget takes: gradients on validation data, and validations."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from nm_permute_plugin.pruning.budget.choice import validations
from nm_permute_plugin.pruning.budget.fused import FusedLinears
from nm_permute_plugin.pruning.budget.shares import shares_of_loss
from nm_permute_plugin.pruning.estimate.amounts import Amounts
from nm_permute_plugin.pruning.estimate.meter import Meter, Took
from nm_permute_plugin.pruning.estimate.validation import passes
from nm_permute_plugin.pruning.running.teacher import Teacher


def choosing(
    teacher: Teacher,
    masks: Mapping[str, Tensor],
    groups: Sequence[FusedLinears],
    amounts: Amounts,
    meter: Meter,
) -> tuple[None, Took, int]:
    """Measure the gradients and a validation of one batch, counted for all of them."""
    _, validation = passes(teacher, dict(masks), amounts, meter)
    batch, memory = amounts.validation, amounts.settings.memory
    _, gradients = meter.took(
        lambda: shares_of_loss(teacher, masks, groups, [batch], memory)
    )
    took = gradients * amounts.validation_batches
    return (
        None,
        took + validation * validations(len(groups), amounts.settings.budget),
        0,
    )
