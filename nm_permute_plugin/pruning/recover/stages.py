# SPDX-License-Identifier: Apache-2.0
"""Recovery after the fold: the masks stay as they are, the kept weights change."""

import time
from dataclasses import dataclass

from loguru import logger

from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.recover.blocks import rebuild_blocks
from nm_permute_plugin.pruning.recover.distill import distill
from nm_permute_plugin.pruning.recover.rescale import rescaled
from nm_permute_plugin.pruning.recover.student import Student, Values
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.search import History
from nm_permute_plugin.pruning.settings import RecoverStage, Settings


@dataclass(frozen=True)
class StageRecord:
    """
    What one stage did.

    :param validation: the whole model's validation loss, before and after
    :param kept: whether the new weights were kept, because the loss fell
    :param history: the stage's own validations
    """

    stage: RecoverStage
    validation: tuple[float, float]
    kept: bool
    seconds: float
    history: History


def recover(
    student: Student, teacher: Teacher, data: Data, settings: Settings
) -> list[StageRecord]:
    """
    Change the weights that masks keep, so that the pruned model follows the dense one.

    The validation loss of the whole pruned model judges every stage; what does not make it
    smaller is dropped. The same seed gives the same weights.

    :param student: its values are replaced, the model stays as it is
    :param teacher: the dense model as it is after the fold
    :raises ValueError: if a stage cannot run on this model, or a loss is not finite
    """
    loss = teacher.validate(student.masks(), data.validation)
    records = []
    for stage in settings.recover.stages:
        started = time.perf_counter()
        values, history = _run(stage, student, teacher, data, settings)
        after = teacher.validate(student.masks(values), data.validation)
        better = after < loss
        seconds = time.perf_counter() - started
        records.append(StageRecord(stage, (loss, after), better, seconds, history))
        logger.info(
            f"Recovery, {stage}: validation loss {loss:.4f} -> {after:.4f}"
            f"{'' if better else ', not kept'}; {seconds:.1f} s"
        )
        if better:
            student.values.update(values)
            loss = after
    return records


def _run(
    stage: RecoverStage,
    student: Student,
    teacher: Teacher,
    data: Data,
    settings: Settings,
) -> tuple[Values, History]:
    """The new values of one stage, and its validations."""
    if stage == "rescale":
        return student.rounded(rescaled(student, data.train)), []
    if stage == "blocks":
        return rebuild_blocks(student, data, settings.recover.blocks, settings.seed)
    return distill(student, teacher, data, settings)
