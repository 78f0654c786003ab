# SPDX-License-Identifier: Apache-2.0
"""What the choice under a budget takes: gradients on validation data, and validations."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from nm_permute_plugin.pruning.budget.choice import turns, validations
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
    copied: int,
) -> tuple[None, Took, int]:
    """
    Measure the gradients and a validation of one batch, counted for all of them.

    :param copied: bytes of the scores, which are copied of what stays sparse
    """
    _, validation = passes(teacher, dict(masks), amounts, meter)
    batch, settings = amounts.validation, amounts.settings
    _, gradients = meter.took(
        lambda: shares_of_loss(teacher, masks, groups, [batch], settings.memory)
    )
    took = gradients * (amounts.validation_batches * turns(settings))
    return None, took + validation * validations(len(groups), settings), copied
