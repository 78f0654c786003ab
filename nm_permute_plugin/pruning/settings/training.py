# SPDX-License-Identifier: Apache-2.0
"""The loss, the validation and the memory, of learning and of the recovery alike."""

from pydantic import Field, model_validator

from nm_permute_plugin.pruning.settings.frozen import Frozen


class LossSettings(Frozen):
    """
    Weights of the parts of the loss, each a mean over tokens; 0 leaves a part out.

    :param divergence: weight of the KL divergence of the pruned model's next-token (or
        class) distribution from the dense one's; where the model has no head, of the
        relative squared error of the final hidden states
    :param cross_entropy: weight of the cross entropy of the next token of the text
    :param hidden: weight of the Smooth-L1 distance of every layer's hidden states from
        the dense ones, summed over layers (https://arxiv.org/abs/2601.22980, eq. 7)
    :param cosine: weight of one minus the cosine similarity of the final hidden states
        (https://arxiv.org/abs/2510.10136, eq. 10)
    """

    divergence: float = Field(default=1.0, ge=0)
    cross_entropy: float = Field(default=0.0, ge=0)
    hidden: float = Field(default=0.0, ge=0)
    cosine: float = Field(default=0.0, ge=0)

    @property
    def needs_hidden(self) -> bool:
        """Whether the loss compares the hidden states of layers."""
        return self.hidden > 0 or self.cosine > 0

    @model_validator(mode="after")
    def _compare_something(self) -> "LossSettings":
        if not any((self.divergence, self.cross_entropy, self.hidden, self.cosine)):
            raise ValueError("all weights of the loss are 0: nothing would be learned")
        return self


class ValidationSettings(Frozen):
    """
    The data that only validates: it chooses permutations, multipliers and weights.

    :param share: share of the calibration rows that validate; at least one row, never all
    :param every: optimizer steps from one validation to the next; null takes 20, or a
        thirtieth of the stage's steps where that is more, so that validation stays a small
        part of long stages
    """

    share: float = Field(default=0.1, gt=0, lt=1)
    every: int | None = Field(default=None, ge=1)

    def interval(self, steps: int) -> int:
        """
        Optimizer steps from one validation to the next, in a stage of so many.

        >>> ValidationSettings().interval(600), ValidationSettings().interval(6000)
        (20, 200)
        """
        return max(20, steps // 30) if self.every is None else self.every


class MemorySettings(Frozen):
    """
    How a step fits into memory, in learning and in the recovery ``end_to_end``.

    :param micro_batch_size: rows that go through the model at a time, with the same
        gradient; null takes a whole batch
    :param gradient_checkpointing: true keeps only what enters a layer, and runs the layer
        again in backward; null decides by the GPU's free memory
    :param shard: true keeps a part of every weight on each GPU of ``torchrun``, for a model
        that fits on none of them; it stays whole on the CPU, where it is folded and pruned
    """

    micro_batch_size: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool | None = None
    shard: bool = False
