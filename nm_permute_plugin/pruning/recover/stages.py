# SPDX-License-Identifier: Apache-2.0
"""Recovery after the fold: the masks stay as they are, the kept weights change."""

import time
from dataclasses import dataclass
from functools import partial

from loguru import logger

from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.recover.blocks import rebuild_blocks
from nm_permute_plugin.pruning.recover.distill import distill
from nm_permute_plugin.pruning.recover.rescale import rescaled
from nm_permute_plugin.pruning.recover.student import Student, Values
from nm_permute_plugin.pruning.resuming import kept
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
    :param rounded: whether all losses are of weights rounded as they will be served
    """

    stage: RecoverStage
    validation: tuple[float, float]
    kept: bool
    seconds: float
    history: History
    rounded: bool = False


def recover(
    student: Student,
    teacher: Teacher,
    data: Data,
    settings: Settings,
    known: str = "",
) -> list[StageRecord]:
    """
    Change the weights that masks keep, so that the pruned model follows the dense one.

    The validation loss of the whole pruned model decides on every stage: what leaves it
    as large is dropped. The same seed gives the same weights.

    :param student: its values are replaced, the model stays as it is
    :param teacher: the dense model as it is after the fold
    :param known: by which a run that goes on knows the model and the data
    :raises ValueError: if a stage cannot run on this model, or a loss is not finite
    """
    loss = teacher.validate(student.masks(), data.validation)
    records = []
    for stage in settings.recover.stages:
        work = partial(
            _tried, stage, student, teacher, data, settings, loss, f"{known} {stage}"
        )
        values, history, after, better, seconds = kept(work, f"recovery {stage}", known)
        said = (loss, after), better, seconds, history, student.is_rounded
        records.append(StageRecord(stage, *said))
        logger.info(
            f"Recovery, {stage}: validation loss {loss:.4f} -> {after:.4f}"
            f"{'' if better else ', not kept'}; {seconds:.1f} s"
        )
        if better:
            student.values.update(values)
            loss = after
    return records


def _tried(
    stage: RecoverStage,
    student: Student,
    teacher: Teacher,
    data: Data,
    settings: Settings,
    loss: float,
    known: str,
) -> tuple[Values, History, float, bool, float]:
    """
    The new values of one stage, its validations, the loss with them, and the seconds.

    :param loss: with the old values, which stay unless the new ones are better
    """
    started = time.perf_counter()
    history: History = []
    if stage == "rescale":
        values = student.rounded(rescaled(student, data.train))
    elif stage == "blocks":
        values, history = rebuild_blocks(
            student, data, settings.recover.blocks, settings.seed, known
        )
    else:
        values, history = distill(student, teacher, data, settings, known)
    after = teacher.validate(student.masks(values), data.validation)
    better = after < loss
    seconds = time.perf_counter() - started
    return values if better else {}, history, after, better, seconds
