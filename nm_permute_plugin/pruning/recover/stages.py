# SPDX-License-Identifier: Apache-2.0
"""Fold, then update weights: the masks stay as they are, the kept weights change."""

import time
from dataclasses import dataclass, field
from typing import Literal

from loguru import logger

from nm_permute_plugin.pruning.recover.blocks import BlockSettings, rebuild_blocks
from nm_permute_plugin.pruning.recover.distill import DistillSettings, distill
from nm_permute_plugin.pruning.recover.rescale import rescaled
from nm_permute_plugin.pruning.recover.student import KeptWeights, Values
from nm_permute_plugin.pruning.samples import Samples

Stage = Literal["rescale", "blocks", "end_to_end"]


@dataclass(frozen=True)
class RecoverSettings:
    """
    How the weights that the masks keep are changed.

    :param stages: one after the other, each from what the one before left
    """

    stages: tuple[Stage, ...] = ()
    blocks: BlockSettings = field(default_factory=BlockSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)


@dataclass(frozen=True)
class StageRecord:
    """
    What one stage did.

    :param validation: the whole model's loss on the validation samples, before and after
    :param kept: whether the new weights were kept: the loss fell
    :param history: the stage's own looks at the validation samples
    """

    stage: Stage
    validation: tuple[float, float]
    kept: bool
    seconds: float
    history: list[dict[str, int | float]]


def recover(
    kept: KeptWeights, samples: Samples, settings: RecoverSettings
) -> list[StageRecord]:
    """
    Change the weights that masks keep, so that the pruned model follows the dense one.

    Every stage is judged by the loss of the whole pruned model on the validation samples;
    what does not make it better is dropped. The same seed gives the same weights.

    :param kept: what the masks keep; its values are replaced, the model stays as it is
    :raises ValueError: if a stage cannot run on this model, or a loss is not finite
    """
    weights = settings.distill.loss
    loss = kept.mean_loss(samples.validation, weights)
    records = []
    for stage in settings.stages:
        started = time.perf_counter()
        values, history = _run(stage, kept, samples, settings)
        after = kept.mean_loss(samples.validation, weights, values)
        better = after < loss
        seconds = time.perf_counter() - started
        records.append(StageRecord(stage, (loss, after), better, seconds, history))
        logger.info(
            f"recover, {stage}: validation loss {loss:.4f} -> {after:.4f}"
            f"{'' if better else ', not kept'}; {seconds:.1f} s"
        )
        if better:
            kept.values.update(values)
            loss = after
    return records


def _run(
    stage: Stage, kept: KeptWeights, samples: Samples, settings: RecoverSettings
) -> tuple[Values, list[dict[str, int | float]]]:
    if stage == "rescale":
        return kept.rounded(rescaled(kept, samples.train)), []
    if stage == "blocks":
        return rebuild_blocks(kept, samples, settings.blocks)
    return distill(kept, samples, settings.distill)
