# SPDX-License-Identifier: Apache-2.0
"""The settings of a whole run, and what of them fits together."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nm_permute_plugin.checkpoint.config import AskedFormat
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.scores import ScoreName
from nm_permute_plugin.pruning.settings.budget import BudgetSettings
from nm_permute_plugin.pruning.settings.frozen import Frozen, refuse_unread
from nm_permute_plugin.pruning.settings.learning import (
    LearnSettings,
    LearnStage,
    SearchSettings,
)
from nm_permute_plugin.pruning.settings.recovery import RecoverSettings
from nm_permute_plugin.pruning.settings.training import (
    LossSettings,
    MemorySettings,
    ValidationSettings,
)
from nm_permute_plugin.pruning.settings.types import LIST, Names, PatternText, SpecLines

Method = Literal["learned", "search", "identity"]
Objective = Literal["end_to_end", "layer_wise"]
Family = Literal["residual", "hidden", "value"]


class Settings(Frozen):
    """
    What a run does to a model.

    :param mask_structure: the pattern N:M, in quotes: N weights are kept of every M
        neighbouring input channels
    :param score: how the worth of a weight is measured: ``wanda`` and ``ria`` by weights
        and activations, ``magnitude`` by weights alone
    :param method: ``learned`` searches a permutation and then learns what ``learn`` says;
        ``search`` learns nothing; ``identity`` prunes by the plain score, without a
        permutation
    :param spaces: the kinds of channels that may change places: of the residual stream,
        of the inner width of MLPs (``hidden``), of attention values
    :param targets: the linears to prune, as names of modules, ``re:`` patterns or names
        of classes
    :param ignore: the linears that stay dense, named in the same ways
    :param prune: false only folds the permutation into the weights, for a pruning
        modifier that follows in the recipe
    :param format: how the checkpoint is stored: ``dense`` (zeros are stored, loads
        everywhere), ``sparse-24-bitmask`` (2:4 only, smaller; this plugin reads it),
        ``sparse-bitmask`` (any pattern, likewise), or ``auto``: sparse-24-bitmask for
        2:4, dense for other patterns and what no sparse format holds (4-bit
        quantization, quantized experts, Conv1D)
    :param spec: a permutation spec for an architecture that has no known one, as a
        mapping or as the path of a YAML file that holds it
    :param objective: what learning makes small: ``end_to_end`` the loss of the whole
        model; ``layer_wise`` the output error of one decoder layer after the other, for
        models that do not fit on their device (the residual stream keeps the search's
        permutation)
    :param batch_size: rows of text, or images, of an optimizer step; a sample of text
        with images is a batch of its own
    :param seed: seed of every random choice, such as the order of a shuffled data set
    :param learn: what is learned, with ``method: learned``
    :param search: the search for a permutation, with ``method: search`` and ``learned``
    :param recover: how the weights that the masks keep are changed, by default not at
        all; a list of stages may stand for the group: ``recover: [end_to_end]``
    :param budget: which linears stay dense, by how much may be lost, how much may stay
        dense, or how fast the rest must be; by default none
    :param loss: weights of the parts of the loss, which learning, the recovery and every
        validation measure; 0 leaves a part out
    :param validation: the calibration data that only validates: it chooses permutations,
        multipliers and weights
    :param memory: how a step fits into memory, in learning and in the recovery
        ``end_to_end``
    """

    mask_structure: PatternText = "2:4"
    score: ScoreName = "wanda"
    method: Method = "learned"
    spaces: Annotated[tuple[Family, ...], *LIST] = Field(
        default=("residual", "hidden", "value"), min_length=1
    )
    targets: Names = Field(default=("Linear",), min_length=1)
    ignore: Names = ("lm_head",)
    prune: bool = True
    format: AskedFormat = "auto"
    spec: SpecLines = None
    objective: Objective = "end_to_end"
    batch_size: int = Field(default=8, ge=1)
    seed: int = 0
    learn: LearnSettings = LearnSettings()
    search: SearchSettings = SearchSettings()
    recover: RecoverSettings = RecoverSettings()
    budget: BudgetSettings = BudgetSettings()
    loss: LossSettings = LossSettings()
    validation: ValidationSettings = ValidationSettings()
    memory: MemorySettings = MemorySettings()

    @property
    def pattern(self) -> NMPattern:
        """``mask_structure`` as a value."""
        return NMPattern.parse(self.mask_structure)

    @property
    def layer_wise(self) -> bool:
        """Whether the whole model is too large for its device: scores stay on the CPU."""
        return self.objective == "layer_wise"

    @property
    def stages(self) -> tuple[LearnStage, ...]:
        """The stages of learning that run."""
        return self.learn.stages if self.method == "learned" else ()

    @property
    def training_steps(self) -> int:
        """The optimizer steps end to end: of learning, and of the recovery."""
        steps = 0
        if self.method == "learned" and not self.layer_wise:
            steps += sum(steps for _, steps in self.learn.schedule())
        if "end_to_end" in self.recover.stages:
            steps += self.recover.end_to_end.steps
        return steps

    def _refuse_in_shards(self) -> None:
        """See that shards are asked for what they can be used for."""
        if not self.memory.shard:
            return
        unfit = {
            "method: identity": self.method == "identity",
            "objective: layer_wise": self.layer_wise,
            f"learn.stages {list(self.stages)}": set(self.stages) - {"multipliers"},
            f"recover {list(self.recover.stages)}": {*self.recover.stages}
            - {"end_to_end"},
            "loss.hidden or loss.cosine": self.loss.needs_hidden,
            "budget": self.budget.goal is not None,
        }
        names = [name for name, is_so in unfit.items() if is_so]
        if names:
            raise ValueError(
                "memory.shard is for learning multipliers, and recovery, end to end, and "
                f"not for {', '.join(names)}: leave out the one or the other"
            )

    @model_validator(mode="after")
    def _fit_together(self) -> "Settings":
        pattern = self.pattern
        for name in ("swaps", "published"):
            group = getattr(self.learn, name)
            size = group.block_size
            # The default is an upper bound: ``size_in`` finds what fits.
            if size != type(group)().block_size and size % pattern.m:
                raise ValueError(
                    f"learn.{name}.block_size={size} must be a multiple of M={pattern.m} "
                    f"in mask_structure={self.mask_structure!r}"
                )
        if self.format == "sparse-24-bitmask" and pattern != NMPattern(2, 4):
            raise ValueError(
                f"format {self.format} stores 2:4 only, not {pattern}; use format: "
                "sparse-bitmask, or dense"
            )
        if self.method == "identity" and not self.prune:
            raise ValueError("method: identity with prune: false would change nothing")
        if not self.prune and "multipliers" in self.stages:
            raise ValueError(
                "prune: false with learn.stages [multipliers] would learn the scores of a "
                "mask that another modifier makes; write learn: {stages: [swaps]}"
            )
        self._refuse_in_shards()
        if self.recover.stages and not self.prune:
            raise ValueError(
                f"recover: {list(self.recover.stages)} with prune: false: there is no mask "
                "whose kept weights could change; leave `recover` out, or prune here"
            )
        self._fit_budget()
        self._refuse_unread_groups()
        self._fit_memory()
        return self

    def _fit_budget(self) -> None:
        if self.budget.goal is None:
            return
        if not self.prune:
            raise ValueError(
                "budget with prune: false: another modifier prunes, and would not know of "
                "it; leave `budget` out, or prune here"
            )
        if self.layer_wise:
            raise ValueError(
                "budget with objective: layer_wise: what masks cost is measured by "
                "gradients through the whole model; leave `budget` out, or learn end_to_end"
            )

    def _refuse_unread_groups(self) -> None:
        method = f"method: {self.method}"
        recovers = bool(self.recover.stages)
        if self.method != "learned":
            refuse_unread(self, "learn", "", method)
        if self.method == "identity":
            refuse_unread(self, "search", "", method)
            refuse_unread(self, "spaces", "", method)
        if self.method == "identity" and not recovers and self.budget.goal is None:
            refuse_unread(self, "loss", "", method)
        if self.method != "learned" and "end_to_end" not in self.recover.stages:
            refuse_unread(self, "memory", "", method)
            refuse_unread(self.validation, "every", "validation.", method)

    def _fit_memory(self) -> None:
        memory = self.memory
        if memory.micro_batch_size and memory.micro_batch_size > self.batch_size:
            raise ValueError(
                f"memory.micro_batch_size={memory.micro_batch_size} is above batch_size="
                f"{self.batch_size}: a batch cannot be cut into parts larger than itself"
            )
        if self.layer_wise and "end_to_end" not in self.recover.stages:
            refuse_unread(
                self,
                "memory",
                "",
                "objective: layer_wise, which has one layer at a time in memory",
            )
