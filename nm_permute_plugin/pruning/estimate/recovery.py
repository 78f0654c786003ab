# SPDX-License-Identifier: Apache-2.0
"""What the recovery takes: a few steps of every stage of it."""

from functools import partial

import torch

from nm_permute_plugin.pruning.estimate.amounts import Amounts
from nm_permute_plugin.pruning.estimate.layers import rebuilding
from nm_permute_plugin.pruning.estimate.learning import dense_passes, timed
from nm_permute_plugin.pruning.estimate.meter import Meter, Took
from nm_permute_plugin.pruning.estimate.validation import passes
from nm_permute_plugin.pruning.recover.optimizer import RelativeAdamW
from nm_permute_plugin.pruning.recover.rescale import rescaled
from nm_permute_plugin.pruning.recover.student import Student
from nm_permute_plugin.pruning.running.backward import Backward
from nm_permute_plugin.pruning.running.masked import frozen
from nm_permute_plugin.pruning.running.teacher import Teacher


def recovery(
    student: Student, teacher: Teacher, amounts: Amounts, meter: Meter
) -> tuple[None, Took, int]:
    """Measure a few steps of every stage of the recovery."""
    data, stages = amounts.data, amounts.settings.recover.stages
    dense, validation = passes(teacher, student.masks(), amounts, meter)
    # The start is validated, and what each stage leaves.
    took = dense + validation * (1 + len(stages))
    more = teacher.bytes_to_come([*data.train, *data.validation])
    for stage in stages:
        if stage == "rescale":
            _, one = meter.took(partial(rescaled, student, [amounts.batch]))
            took += one * amounts.train_batches
        elif stage == "blocks":
            rebuilt, streams = rebuilding(student, amounts, meter)
            took, more = took + rebuilt, more + streams
        else:
            took += _distilling(student, teacher, amounts, meter)
            steps = amounts.settings.recover.end_to_end.steps
            took += validation * (1 + amounts.validations(steps))
    return None, took, more


def _distilling(
    student: Student, teacher: Teacher, amounts: Amounts, meter: Meter
) -> Took:
    """Steps as ``distill`` takes them, and the rounding of the weights for a validation."""
    settings = amounts.settings
    recover = settings.recover.end_to_end
    with frozen(student.model), torch.enable_grad():
        masters = student.masters(student.linears)
        optimizer = RelativeAdamW(masters, recover.rate, recover.steps)
        backward = Backward(
            teacher,
            partial(student.masks, masters),
            masters.values(),
            amounts.data.train,
            settings.memory,
            use_graph=True,
        )

        def step() -> None:
            backward(amounts.batch)
            optimizer.step()

        ends = settings.method == "learned" and not settings.layer_wise
        before = amounts.steps if ends else 0
        took = dense_passes(teacher, amounts, recover.steps, meter, before)
        one, once = timed(step, meter)
        _, rounded = meter.took(lambda: len(student.rounded(masters)))
    count = amounts.validations(recover.steps)
    return took + once + one * (recover.steps * amounts.per_step) + rounded * count
