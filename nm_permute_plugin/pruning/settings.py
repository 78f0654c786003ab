# SPDX-License-Identifier: Apache-2.0
"""
Everything that can be said of a run: the fields of a recipe, with their defaults.

``Settings`` is what the modifier of a recipe, a notebook and a benchmark all take. A
setting that nothing would read is refused, so none is ignored in silence.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from nm_permute_plugin.checkpoint.config import AskedFormat
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.scores import ScoreName
from nm_permute_plugin.pruning.setting_errors import with_remedies
from nm_permute_plugin.pruning.setting_types import LIST, Names, PatternText, SpecLines

Method = Literal["learned", "search", "identity"]
Objective = Literal["end_to_end", "layer_wise"]
Family = Literal["residual", "hidden", "value"]
LearnStage = Literal["multipliers", "swaps", "soft", "straight_through"]
RecoverStage = Literal["rescale", "blocks", "end_to_end"]


def _refuse_unread(of: BaseModel, name: str, place: str, because: str) -> None:
    """Refuse a setting that differs from its default where nothing would read it."""
    value, default = getattr(of, name), type(of).model_fields[name].default
    if value != default:
        raise ValueError(
            f"{place}{name} is set, and nothing reads it with {because}; leave it out"
        )


class Frozen(BaseModel):
    """A group of settings that never changes, and refuses what it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )

    def __new__(cls, *given: object, **fields: object) -> "Frozen":
        """Refuse values without their names, of which pydantic says little."""
        if given:
            kind, names = cls.__name__, list(cls.model_fields)
            first = "method" if "method" in names else names[0]
            raise TypeError(
                f"{kind} takes its fields by name, and got {given[0]!r} without one: "
                f"write {kind}({first}=...)"
            )
        return super().__new__(cls)

    @model_validator(mode="wrap")
    @classmethod
    def _lead_to_remedies(cls, value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            # A modifier has fields of its host beside these, which no recipe names.
            own = next(
                kind
                for kind in cls.__mro__
                if issubclass(kind, Frozen) and kind.__module__ == __name__
            )
            raise with_remedies(error, cls, list(own.model_fields)) from None


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
            _refuse_unread(self, "block_size", "", because)
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
                _refuse_unread(self, name, "learn.", f"stages: {list(self.stages)}")
        return self


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
                _refuse_unread(self, name, "recover.", f"stages: {list(self.stages)}")
        return self


class BudgetSettings(Frozen):
    """
    How much may stay dense, or how much may be lost; without one of the first three fields
    no linear stays dense for it.

    Linears that serving fuses (queries, keys and values; gate and up) stay dense together,
    those first whose masks cost most on the validation data for what they save. They are
    chosen once the masks are found, before the recovery.

    :param max_loss_increase: by how much the loss on the validation data (in nats a token,
        by default) may lie above the dense model's, before the recovery; as many linears
        stay dense as that takes
    :param dense_share: share of the weights of the linears to prune that stay dense
    :param min_speedup: how many times as fast as dense the products of all linears to prune
        must be together, by the times in ``kernels``
    :param kernels: the folder of kernel tables that serving measured on the GPU that shall
        serve the checkpoint (``NM_PERMUTE_CACHE``, by default ``~/.cache/nm-permute``)
    :param tokens: of the products that ``min_speedup`` is for: sequences that are decoded
        at a time
    """

    max_loss_increase: float | None = Field(default=None, gt=0)
    dense_share: float | None = Field(default=None, gt=0, lt=1)
    min_speedup: float | None = Field(default=None, gt=1)
    kernels: str | None = None
    tokens: int = Field(default=16, ge=1)

    @property
    def goal(self) -> str | None:
        """The name of the field that says how much; None without a budget."""
        goals = ("max_loss_increase", "dense_share", "min_speedup")
        return next((n for n in goals if getattr(self, n) is not None), None)

    @model_validator(mode="after")
    def _say_one_thing(self) -> "BudgetSettings":
        for name in ("dense_share", "min_speedup"):
            if name != self.goal and getattr(self, name) is not None:
                raise ValueError(
                    f"budget has two goals, {self.goal} and {name}: give one"
                )
        if self.min_speedup is None:
            for name in ("kernels", "tokens"):
                _refuse_unread(self, name, "budget.", "no min_speedup")
        elif self.kernels is None:
            raise ValueError(
                "budget.min_speedup needs the times of the kernels: give budget.kernels, "
                "the folder where serving keeps its kernel tables"
            )
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
        2:4, dense for other patterns, experts, and what no sparse format holds (4-bit
        quantization, Conv1D)
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
            _refuse_unread(self, "learn", "", method)
        if self.method == "identity":
            _refuse_unread(self, "search", "", method)
            _refuse_unread(self, "spaces", "", method)
        if self.method == "identity" and not recovers and self.budget.goal is None:
            _refuse_unread(self, "loss", "", method)
        if self.method != "learned" and "end_to_end" not in self.recover.stages:
            _refuse_unread(self, "memory", "", method)
            _refuse_unread(self.validation, "every", "validation.", method)

    def _fit_memory(self) -> None:
        memory = self.memory
        if memory.micro_batch_size and memory.micro_batch_size > self.batch_size:
            raise ValueError(
                f"memory.micro_batch_size={memory.micro_batch_size} is above batch_size="
                f"{self.batch_size}: a batch cannot be cut into parts larger than itself"
            )
        if self.layer_wise and "end_to_end" not in self.recover.stages:
            _refuse_unread(
                self,
                "memory",
                "",
                "objective: layer_wise, which has one layer at a time in memory",
            )
