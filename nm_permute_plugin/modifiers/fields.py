# SPDX-License-Identifier: Apache-2.0
"""What a recipe can say of orders and pruning, and what does not go together."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from nm_permute_plugin.checkpoint.config import AskedFormat
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.scores import ScoreName
from nm_permute_plugin.modifiers.targets import DEFAULT_IGNORE
from nm_permute_plugin.pruning.learn.loop import LearnSettings
from nm_permute_plugin.pruning.learn.order_shape import OrderShape, Relaxation
from nm_permute_plugin.pruning.pipeline import Method, Objective, OrderSettings
from nm_permute_plugin.pruning.recover.blocks import BlockSettings
from nm_permute_plugin.pruning.recover.distill import DistillSettings
from nm_permute_plugin.pruning.recover.stages import RecoverSettings, Stage
from nm_permute_plugin.pruning.running.loss import LossWeights

Family = Literal["residual", "hidden", "value"]


class OrderFields(BaseModel):
    """
    The fields of ``LearnablePermutationModifier``.

    :param mask_structure: N:M, N weights kept of every M input channels
    :param score: which weights are worth keeping: wanda, ria or magnitude
    :param method: learned (starts from the search), search (nothing learned) or identity
        (the plain score, in the order as it is)
    :param spaces: the kinds of channels that may change places
    :param targets: the linears to prune, as names, `re:` patterns or class names
    :param ignore: the linears that stay dense
    :param prune: False folds the order only, for a pruning modifier that follows
    :param format: how the checkpoint is saved: dense (zeros stored, loads everywhere),
        sparse-24-bitmask (2:4 only, smaller; needs this plugin to load), sparse-bitmask
        (any pattern, likewise) or auto: sparse-24-bitmask for 2:4, dense for other
        patterns, experts, and what no sparse format holds (4-bit quantization, Conv1D)
    :param spec: a permutation spec for an architecture that is not known
    :param objective: end_to_end (the loss of the whole model) or layer_wise (the output
        error of decoder layers, one after the other: for models whose gradients, or
        whose weights, do not fit: offloaded ones are fetched a layer at a time; the
        order of the residual stream stays the search's)
    :param steps: optimiser steps; layer_wise: of each layer
    :param batch_size: rows of calibration text, or images, a step; one sample of text
        with images is a step of its own
    :param micro_batch_size: rows that go through the model at a time; a whole batch by
        default
    :param gradient_checkpointing: keep only what enters a layer, and run it again in
        backward; by default where a GPU's memory asks for it
    :param order_share: of the steps, in which the orders learn; then they stay, and the
        multipliers of the scores learn. By default none: the search's orders were as
        good to learn multipliers for. Without multipliers orders learn all the time
    :param swaps: the share of blocks in which two channels change places at the first
        step; falls linearly to 0
    :param block_size: channels that mix with each other; a multiple of M
    :param groups: instead of block_size: into how many blocks a space is cut
    :param relaxation: insertion (hard groups that swap channels, by the cost of every
        single move), or one of the published straight_through (hard places) and soft
        (soft places, hard at the end), which have logits and no multipliers
    :param learning_rate: of AdamW, on the logits; falls linearly to 0
    :param weight_decay: of AdamW, on the logits
    :param temperature_start: of the logits' matching, at the first step
    :param temperature_end: of the logits' matching, at the last step
    :param start_logit: how firmly a channel starts in its place, with logits
    :param sinkhorn_iterations: row and column normalisations of the logits' matching
    :param row_limit: rows of a space that weigh the moves of a step; all by default
    :param score_multipliers: learn what the scores of each input channel are multiplied
        by as well, so that consumers of one order choose for themselves; as ``prune`` by
        default, because a pruner that follows has scores of its own
    :param multiplier_rows: rows of a linear that share multipliers; null: all of them
    :param multiplier_rate: of AdamW, on the logarithms of the multipliers
    :param divergence_weight: of the divergence from the dense model's predictions of
        tokens or classes, or final hidden states where there are none
    :param cross_entropy_weight: of the next-token loss of the text itself
    :param hidden_weight: of the Smooth-L1 distance of all hidden states
    :param cosine_weight: of the cosine distance of the final hidden states
    :param search_rounds: rounds of assignment of the search
    :param validation: share of the calibration rows that only judge
    :param evaluate_every: steps between two looks at the validation rows
    :param seed: of every random choice
    :param recover: none (weights are frozen), or stages that change the weights that the
        mask keeps, in the order given: rescale (one number an output row, in closed
        form), blocks (decoder layers rebuilt one after the other against the dense
        model's), end_to_end (the whole model, with the loss of the orders). Validation
        text judges every stage; the mask stays as it is
    :param recover_window: decoder layers that ``blocks`` trains together
    :param recover_epochs: passes of ``blocks`` over the training text
    :param recover_steps: optimiser steps of ``end_to_end``
    :param recover_blocks_rate: of AdamW in ``blocks``: a step moves a weight by about
        this share of its linear's root mean square; rises at first, then falls to 0
    :param recover_end_to_end_rate: the same in ``end_to_end``
    """

    mask_structure: str = "2:4"
    score: ScoreName = "wanda"
    method: Method = "learned"
    spaces: list[Family] = Field(default=["residual", "hidden", "value"], min_length=1)
    targets: list[str] = Field(default=["Linear"], min_length=1)
    ignore: list[str] = DEFAULT_IGNORE
    prune: bool = True
    format: AskedFormat = "auto"
    spec: dict[str, str] | None = None
    objective: Objective = "end_to_end"
    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=8, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool | None = None
    order_share: float = Field(default=0.0, ge=0, le=1)
    swaps: float = Field(default=1.0, gt=0, le=1)
    learning_rate: float = Field(default=0.01, gt=0)
    temperature_start: float = Field(default=1.0, gt=0)
    temperature_end: float = Field(default=0.1, gt=0)
    block_size: int = Field(default=64, ge=2)
    groups: int | None = Field(default=None, ge=1)
    relaxation: Relaxation = "insertion"
    start_logit: float = Field(default=0.3, ge=0)
    sinkhorn_iterations: int = Field(default=10, ge=1)
    row_limit: int | None = Field(default=None, ge=1)
    score_multipliers: bool | None = None
    multiplier_rows: int | None = Field(default=16, ge=1)
    multiplier_rate: float = Field(default=0.01, gt=0)
    divergence_weight: float = Field(default=1.0, ge=0)
    cross_entropy_weight: float = Field(default=0.0, ge=0)
    hidden_weight: float = Field(default=0.0, ge=0)
    cosine_weight: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    search_rounds: int = Field(default=12, ge=1)
    validation: float = Field(default=0.1, gt=0, lt=1)
    evaluate_every: int = Field(default=20, ge=1)
    seed: int = 0
    recover: Literal["none"] | list[Stage] = "none"
    recover_window: int = Field(default=1, ge=1)
    recover_epochs: int = Field(default=4, ge=1)
    recover_steps: int = Field(default=200, ge=1)
    recover_blocks_rate: float = Field(default=0.01, gt=0)
    recover_end_to_end_rate: float = Field(default=0.003, gt=0)

    @model_validator(mode="after")
    def _fields_make_sense_together(self) -> "OrderFields":
        pattern = NMPattern.parse(self.mask_structure)
        if self.block_size % pattern.m:
            raise ValueError(
                f"block_size={self.block_size} must be a multiple of M={pattern.m} in "
                f"mask_structure={self.mask_structure!r}"
            )
        if self.temperature_end > self.temperature_start:
            raise ValueError(
                f"the temperature falls while learning, but temperature_end="
                f"{self.temperature_end} is above temperature_start="
                f"{self.temperature_start}"
            )
        weights = (
            self.divergence_weight,
            self.cross_entropy_weight,
            self.hidden_weight,
            self.cosine_weight,
        )
        if not any(weights):
            raise ValueError("all weights of the loss are 0: nothing would be learned")
        if self.format == "sparse-24-bitmask" and pattern != NMPattern(2, 4):
            raise ValueError(
                f"format {self.format} stores 2:4 only, not {pattern}; use format: "
                "sparse-bitmask, or dense"
            )
        if self.method == "identity" and not self.prune:
            raise ValueError("method: identity with prune: false would change nothing")
        if self.score_multipliers and not self.prune:
            raise ValueError(
                "score_multipliers: true with prune: false would learn the scores of a "
                "mask that another modifier makes; leave score_multipliers out"
            )
        if self.score_multipliers and self.relaxation != "insertion":
            raise ValueError(
                f"score_multipliers: true needs relaxation: insertion, not "
                f"{self.relaxation}"
            )
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            default = type(self).model_fields[name].default
            if self.relaxation == "insertion" and value != default:
                raise ValueError(
                    f"{name}={value} is of logits, which relaxation: insertion does not "
                    "have: leave it out, and see multiplier_rate and swaps"
                )
        self._passes_make_sense()
        self._recovery_makes_sense()
        return self

    def _passes_make_sense(self) -> None:
        if self.micro_batch_size and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is above batch_size="
                f"{self.batch_size}: a batch cannot be cut into parts larger than itself"
            )
        if self.objective == "layer_wise" and (
            self.micro_batch_size or self.gradient_checkpointing
        ):
            raise ValueError(
                "micro_batch_size and gradient_checkpointing are for objective: "
                "end_to_end; layer_wise has one layer at a time in memory"
            )

    def _recovery_makes_sense(self) -> None:
        if self.recover == "none":
            return
        if not self.recover or len(set(self.recover)) < len(self.recover):
            raise ValueError(
                f"recover: {self.recover} must name one or more stages, each once; "
                "recover: none leaves the weights as they are"
            )
        if not self.prune:
            raise ValueError(
                f"recover: {self.recover} with prune: false: there is no mask whose kept "
                "weights could change; leave `recover` out, or prune here"
            )

    @property
    def _multipliers(self) -> bool:
        if self.score_multipliers is None:
            return self.prune and self.relaxation == "insertion"
        return self.score_multipliers

    def settings(self) -> OrderSettings:
        """The same, as the training takes it."""
        loss = LossWeights(
            divergence=self.divergence_weight,
            cross_entropy=self.cross_entropy_weight,
            hidden=self.hidden_weight,
            cosine=self.cosine_weight,
        )
        learn = LearnSettings(
            steps=self.steps,
            order_share=self.order_share,
            swaps=self.swaps,
            learning_rate=self.learning_rate,
            temperature=(self.temperature_start, self.temperature_end),
            shape=OrderShape(
                block_size=self.block_size,
                groups=self.groups,
                relaxation=self.relaxation,
                start_logit=self.start_logit,
                sinkhorn_iterations=self.sinkhorn_iterations,
                row_limit=self.row_limit,
                multipliers=self._multipliers,
                multiplier_rows=self.multiplier_rows,
            ),
            multiplier_rate=self.multiplier_rate,
            loss=loss,
            evaluate_every=self.evaluate_every,
            weight_decay=self.weight_decay,
            seed=self.seed,
            micro_batch_size=self.micro_batch_size,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        return OrderSettings(
            pattern=NMPattern.parse(self.mask_structure),
            score=self.score,
            method=self.method,
            families=tuple(self.spaces),
            search_rounds=self.search_rounds,
            learn=learn,
            objective=self.objective,
            prune=self.prune,
            recover=RecoverSettings(
                stages=() if self.recover == "none" else tuple(self.recover),
                blocks=BlockSettings(
                    window=self.recover_window,
                    epochs=self.recover_epochs,
                    rate=self.recover_blocks_rate,
                    seed=self.seed,
                ),
                distill=DistillSettings(
                    steps=self.recover_steps,
                    rate=self.recover_end_to_end_rate,
                    evaluate_every=self.evaluate_every,
                    seed=self.seed,
                    loss=loss,
                ),
            ),
        )
