# SPDX-License-Identifier: Apache-2.0
"""How the weights that the masks keep are changed."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nm_permute_plugin.pruning.settings.frozen import Frozen, refuse_unread
from nm_permute_plugin.pruning.settings.types import LIST

RecoverStage = Literal["rescale", "blocks", "end_to_end"]


class BlockSettings(Frozen):
    """
    Recovery of decoder layers, one window after the other.

    :param window: decoder layers that are trained together
    :param epochs: passes over the training data for every window
    :param rate: learning rate of AdamW: a step moves a weight by about this share of its
        linear's root mean square; it rises over the first tenth of the steps, then falls
        linearly to 0
    """

    window: int = Field(default=1, ge=1)
    epochs: int = Field(default=4, ge=1)
    rate: float = Field(default=0.01, gt=0)


class DistillSettings(Frozen):
    """
    Recovery of the whole model by distillation.

    :param steps: optimizer steps; each takes one batch
    :param rate: learning rate of AdamW, as in ``recover.blocks.rate``
    """

    steps: int = Field(default=200, ge=1)
    rate: float = Field(default=0.003, gt=0)


class RecoverSettings(Frozen):
    """
    How the weights that the masks keep are changed; by default not at all.

    In a recipe a list of stages may stand for the whole: ``recover: [end_to_end]``.

    :param stages: what changes the kept weights: ``rescale`` (one factor for every output
        row, in closed form), ``blocks`` (decoder layers rebuilt against the dense
        model's), ``end_to_end`` (the whole model distilled); each stage goes on from what
        the one before left
    :param blocks: how the stage ``blocks`` trains
    :param end_to_end: how the stage ``end_to_end`` trains
    """

    stages: Annotated[tuple[RecoverStage, ...], *LIST] = ()
    blocks: BlockSettings = BlockSettings()
    end_to_end: DistillSettings = DistillSettings()

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"stages": value} if isinstance(value, str | list | tuple) else value

    @model_validator(mode="after")
    def _read_every_setting(self) -> "RecoverSettings":
        if len(set(self.stages)) < len(self.stages):
            raise ValueError(f"recover.stages {list(self.stages)} names a stage twice")
        for name in ("blocks", "end_to_end"):
            if name not in self.stages:
                refuse_unread(self, name, "recover.", f"stages: {list(self.stages)}")
        return self
