# SPDX-License-Identifier: Apache-2.0
"""The search for a permutation, and what is learned while the weights are frozen."""

from typing import Annotated, Literal

from pydantic import Field, PlainSerializer, model_validator

from nm_permute_plugin.pruning.settings.frozen import Frozen, refuse_unread
from nm_permute_plugin.pruning.settings.types import LIST

LearnStage = Literal["multipliers", "swaps", "soft", "straight_through"]


class SearchSettings(Frozen):
    """
    The search for a permutation without gradients.

    :param rounds: assignments of every space, rounded up to the next validation; 0 keeps
        the channels as they are, for learning to start from
    """

    rounds: int = Field(default=12, ge=0)


class MultiplierSettings(Frozen):
    """
    Multipliers of the scores: in effect a learned mask.

    :param rows: rows of a linear that share the multipliers of their input channels; null
        lets all rows share them
    :param rate: learning rate of AdamW on the logarithms of the multipliers; it falls
        linearly to 0
    """

    rows: int | None = Field(default=16, ge=1)
    rate: float = Field(default=0.01, gt=0)


class _BlockSettings(Frozen):
    """
    Which channels may mix.

    :param block_size: channels of a block, a multiple of M; no channel leaves its block
    :param blocks_per_space: into how many blocks a space is cut, instead of
        ``block_size``
    """

    block_size: int = Field(default=64, ge=2)
    blocks_per_space: int | None = Field(default=None, ge=1)

    def size_in(self, segment: int, m: int) -> int:
        """
        The size of a block inside a segment of so many channels: the largest multiple of M
        that divides the segment and is no larger than asked for.

        >>> SwapSettings(block_size=64).size_in(576, 4)
        64
        >>> SwapSettings(blocks_per_space=4).size_in(60, 4)
        12
        """
        wanted = self.block_size
        if self.blocks_per_space is not None:
            wanted = segment // self.blocks_per_space
        sizes = range(m, min(max(wanted, m), segment) + 1, m)
        return max(size for size in sizes if segment % size == 0)

    @model_validator(mode="after")
    def _say_one_size(self) -> "_BlockSettings":
        if self.blocks_per_space is not None:
            because = f"blocks_per_space: {self.blocks_per_space}"
            refuse_unread(self, "block_size", "", because)
        return self


class SwapSettings(_BlockSettings):
    """
    A learned permutation: in every block the two channels that promise most change places.

    :param share: share of the blocks in which two channels swap at the first step; it
        falls linearly to 0
    :param row_limit: rows of a space that weigh the moves of a step; null takes all of
        them
    """

    share: float = Field(default=1.0, gt=0, le=1)
    row_limit: int | None = Field(default=None, ge=1)


class PublishedSettings(_BlockSettings):
    """
    A learned permutation by a Sinkhorn matching, for the stages ``soft`` and
    ``straight_through``.

    :param rate: learning rate of AdamW on the logits of the matching; it falls linearly
        to 0
    :param weight_decay: weight decay of AdamW on the logits
    :param temperature: temperature of the matching at the first and at the last step
    :param start_logit: how firmly a channel starts in its place
    :param sinkhorn_iterations: pairs of row and column normalisations in the matching
    """

    rate: float = Field(default=0.01, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    temperature: Annotated[
        tuple[
            Annotated[float, Field(gt=0)],
            Annotated[float, Field(gt=0)],
        ],
        PlainSerializer(list),
    ] = (1.0, 0.1)
    start_logit: float = Field(default=0.3, ge=0)
    sinkhorn_iterations: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _cool_down(self) -> "PublishedSettings":
        first, last = self.temperature
        if last > first:
            raise ValueError(
                f"the temperature falls while learning, but temperature={[first, last]} "
                "rises: give the larger number first"
            )
        return self


class LearnSettings(Frozen):
    """
    What is learned while the weights are frozen, one stage after the other.

    :param stages: what is learned, one stage after the other: ``multipliers`` of the
        scores, which choose the mask; permutations by ``swaps`` of two channels; the
        published permutations ``soft`` (a soft matching that is hardened at the end,
        https://arxiv.org/abs/2601.22980) and ``straight_through`` (a hard matching with
        the soft one's gradient, https://arxiv.org/abs/2510.10136)
    :param steps: optimizer steps of every stage (of every layer with ``objective:
        layer_wise``); a list gives each stage its own number
    :param multipliers: how the stage ``multipliers`` learns
    :param swaps: how the stage ``swaps`` learns
    :param published: how the stages ``soft`` and ``straight_through`` learn
    """

    stages: Annotated[tuple[LearnStage, ...], *LIST] = Field(
        default=("multipliers",), min_length=1
    )
    steps: (
        Annotated[int, Field(ge=1)]
        | Annotated[
            tuple[Annotated[int, Field(ge=1)], ...],
            PlainSerializer(list),
        ]
    ) = 200
    multipliers: MultiplierSettings = MultiplierSettings()
    swaps: SwapSettings = SwapSettings()
    published: PublishedSettings = PublishedSettings()

    def schedule(self) -> list[tuple[LearnStage, int]]:
        """Every stage with its steps."""
        steps = self.steps
        if isinstance(steps, int):
            steps = (steps,) * len(self.stages)
        return list(zip(self.stages, steps, strict=True))

    @model_validator(mode="after")
    def _read_every_setting(self) -> "LearnSettings":
        if len(set(self.stages)) < len(self.stages):
            raise ValueError(f"learn.stages {list(self.stages)} names a stage twice")
        if "multipliers" in self.stages[:-1]:
            raise ValueError(
                f"learn.stages {list(self.stages)}: multipliers belong to the permutation "
                "that they were learned for; name them last"
            )
        if not isinstance(self.steps, int) and len(self.steps) != len(self.stages):
            raise ValueError(
                f"learn.steps {list(self.steps)} must be one number, or one for each of "
                f"the stages {list(self.stages)}"
            )
        readers: dict[str, set[str]] = {
            "multipliers": {"multipliers"},
            "swaps": {"swaps"},
            "published": {"soft", "straight_through"},
        }
        for name, stages in readers.items():
            if not stages & set(self.stages):
                refuse_unread(self, name, "learn.", f"stages: {list(self.stages)}")
        return self
