# SPDX-License-Identifier: Apache-2.0
"""
How long a run will take, and how much memory: measured with a few steps of each stage.

Every piece of work is done once or twice as the run does it, on the same model and device,
with rows of the same length, and counted as often as the run will do it. The model is as
it was afterwards.
"""

import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TypeVar

import torch
from loguru import logger
from torch import Tensor, nn

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.pruning.budget.choice import groups_of
from nm_permute_plugin.pruning.data import Data, forward, on_device
from nm_permute_plugin.pruning.estimate.amounts import Amounts
from nm_permute_plugin.pruning.estimate.budget import choosing
from nm_permute_plugin.pruning.estimate.layers import learning_by_layers
from nm_permute_plugin.pruning.estimate.learning import learning
from nm_permute_plugin.pruning.estimate.meter import Meter, Took, free_memory
from nm_permute_plugin.pruning.estimate.recovery import recovery
from nm_permute_plugin.pruning.estimate.room import DoesNotFit, Room
from nm_permute_plugin.pruning.estimate.saving import saving
from nm_permute_plugin.pruning.estimate.validation import Validation
from nm_permute_plugin.pruning.figures import figures_of
from nm_permute_plugin.pruning.folding import fold_model
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.recover.student import Student
from nm_permute_plugin.pruning.run import PrunePlan
from nm_permute_plugin.pruning.running.compiled import compiled_elementwise
from nm_permute_plugin.pruning.running.fast_dtype import computing_fast
from nm_permute_plugin.pruning.running.forecast import duration
from nm_permute_plugin.pruning.running.masked import evaluating
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.search import alike, rounds_of_all, segments_of
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.pruning.statistics import input_norms, output_sensitivity
from nm_permute_plugin.specs.conv1d import weight_of
from nm_permute_plugin.specs.exactness import random_perms
from nm_permute_plugin.specs.fold import fold, invert_all, write_in_place

T = TypeVar("T")


@dataclass(frozen=True)
class StageEstimate:
    """
    What a stage of a run will take.

    :param peak: bytes that it holds at most, the model among them: of a GPU, or of the
        process
    """

    name: str
    took: Took
    peak: int


@dataclass
class Estimate:
    """
    What a run will take, by stage.

    :ivar held: bytes that were taken before the run
    :ivar unfit: why it cannot run, each in one line with its remedies; the stages after the
        first that does not fit were not measured
    :ivar spent: on measuring
    """

    device: torch.device
    held: int = 0
    stages: list[StageEstimate] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    spent: Took = field(default_factory=Took)

    @property
    def took(self) -> Took:
        """Of all stages together."""
        return sum((stage.took for stage in self.stages), Took())

    @property
    def peak(self) -> int:
        """The most bytes of any stage."""
        return max((stage.peak for stage in self.stages), default=0)


def estimate(
    model: nn.Module,
    plan: PrunePlan,
    data: Data,
    settings: Settings,
    folder: Path | None = None,
    free: Callable[[torch.device], int] = free_memory,
    told: Callable[[str], object] = lambda line: None,
) -> Estimate:
    """
    Measure a few steps of every stage of a run, and say what the whole will take.

    :param folder: in which the checkpoint's folder will lie; some bytes are written there
        for a moment, in a file without a name
    :param free: tells the free bytes of a device
    :param told: is given a line at the start, about how long measuring takes, and one after
        every stage
    :raises ValueError: as ``permute_and_prune``, for what its first steps refuse
    :raises RuntimeError: if a fold changes the function of the model
    """
    meter = Meter(next(model.parameters()).device)
    found = Estimate(meter.device, meter.held())
    stderr = sys.stderr

    def tell(line: str) -> None:
        with redirect_stderr(stderr):
            told(line)

    def probe() -> None:
        with (
            evaluating(model),
            computing_fast(model),
            compiled_elementwise(model, settings.training_steps),
        ):
            room = Room.of(model, plan.prunable, data, settings, meter, free)
            amounts = Amounts(data, settings)
            _Probe(model, plan, amounts, meter, room, found, folder, tell).run()

    # Bars and lines of a log that say what was learned would speak of a few steps.
    logger.disable(__name__.partition(".")[0])
    try:
        with redirect_stderr(StringIO()):
            _, found.spent = meter.took(probe)
    finally:
        logger.enable(__name__.partition(".")[0])
    return found


@dataclass
class _Probe:
    """The stages of a run, each measured with a few of its steps."""

    model: nn.Module
    plan: PrunePlan
    amounts: Amounts
    meter: Meter
    room: Room
    found: Estimate
    folder: Path | None
    tell: Callable[[str], None]

    @property
    def settings(self) -> Settings:
        return self.amounts.settings

    def run(self) -> None:
        """Measure every stage until one does not fit."""
        try:
            self._announce()
            masks, teacher, comparing = self._find()
            if self.settings.recover.stages:
                student = Student(self.model, masks)
                self._stage(
                    "recover",
                    lambda: recovery(student, teacher, self.amounts, self.meter),
                )
                del student
            self._stage("fold and prune", lambda: self._fold(masks, comparing))
            self._stage("save", lambda: self._save(masks))
        except DoesNotFit as error:
            self.found.unfit.append(str(error))

    def _announce(self) -> None:
        """Say how long measuring takes, by a forward pass and the mask of one linear."""
        self.room.check("statistics")
        row = on_device(self.amounts.row, self.model)
        with self.room.caught("statistics"), torch.no_grad():
            forward(self.model, row)  # warms up
            _, one = self.meter.took(lambda: forward(self.model, row))
        weights = [weight_of(self.model.get_submodule(x)) for x in self.plan.prunable]
        part = max(weights, key=Tensor.numel)
        score = part.detach().float().abs().nan_to_num()  # bad ones are told later
        _, mask = self.meter.took(lambda: nm_mask(score, self.settings.pattern))
        masks = sum(map(Tensor.numel, weights)) / part.numel()
        about = one.seconds * self.amounts.measured_passes
        about += mask.seconds * masks * self.amounts.measured_masks
        rounds = " and the time of three rounds of the search"
        self.tell(
            f"Measuring a few steps of every stage on {self.found.device}: about "
            f"{duration(about)}{rounds * (self.settings.method != 'identity')} ..."
        )

    def _find(self) -> tuple[dict[str, Tensor], Teacher, Took]:
        """
        Measure statistics, search and learning.

        :return: masks of the right size, the dense model, and the time of the masks
            that are made, and compared with the plain ones, in the end
        """
        amounts, settings = self.amounts, self.settings
        problem = self._stage("statistics", self._statistics)
        start = problem.complete(Solution())
        if settings.method == "identity":
            self._budget(problem, start)
            masks, comparing = self._masks(problem, start)
            return masks, problem.teacher, comparing
        whole_model = Validation.measure(problem, start, amounts, self.meter)
        self._stage("search", lambda: self._search(problem, start, whole_model))
        self._budget(problem, start)
        if settings.method == "learned":
            learn = learning_by_layers if settings.layer_wise else learning
            self._stage(
                "learn", lambda: learn(problem, start, whole_model, amounts, self.meter)
            )
        masks, comparing = self._masks(problem, start)
        return masks, problem.teacher, comparing

    def _budget(self, problem: Problem, start: Solution) -> None:
        """Measure the choice of what stays dense, if there is one."""
        linears, amounts = self.plan.prunable, self.amounts
        resolved, settings = self.plan.resolved, self.settings
        groups, _ = groups_of(self.model, resolved, linears, settings)
        if not groups:
            return
        copied = sum(of.score.nbytes for of in problem.spaces.values())
        masks, teacher = problem.masks(start), problem.teacher
        given = teacher, masks, groups, amounts, self.meter, copied
        self._stage("budget", lambda: choosing(*given))

    def _masks(
        self, problem: Problem, start: Solution
    ) -> tuple[dict[str, Tensor], Took]:
        masks, made = self.meter.took(lambda: problem.masks(start))
        linears = self.plan.prunable
        _, looked = self.meter.took(lambda: figures_of(problem, start, masks, linears))
        return masks, made + looked

    def _stage(self, name: str, measure: Callable[[], tuple[T, Took, int]]) -> T:
        """
        Measure a stage, and see that it fits.

        :param measure: gives anything, the stage's time, and bytes that the run will hold
            beside those that were held here
        :raises DoesNotFit: if it does not, before it is measured where that is plain
        """
        self.room.check(name)
        with self.room.caught(name), self.meter.peak() as peak:
            (made, took, more), spent = self.meter.took(measure)
        most = peak.value + more
        self.found.stages.append(StageEstimate(name, took, most))
        self.room.check(name, most)
        self.tell(f"Measured in {duration(spent.seconds)}: {name}")
        return made

    def _statistics(self) -> tuple[Problem, Took, int]:
        amounts, settings, model = self.amounts, self.settings, self.model
        linears = self.plan.prunable
        few = Data([amounts.row], [amounts.validation])
        problem, took = self.meter.took(
            lambda: Problem.prepare(model, self.plan.resolved, linears, few, settings)
        )
        if settings.score != "magnitude":
            _, norms = self.meter.took(
                lambda: input_norms(model, linears, [amounts.batch])
            )
            took += norms * max(0.0, amounts.train_batches - 1 / amounts.rows)
        if problem.spaces and not settings.layer_wise:
            seed = settings.seed
            _, row = self.meter.took(
                lambda: output_sensitivity(model, linears, [amounts.row], seed)
            )
            took += row * (amounts.sensitivity_rows - 1)
        return problem, took, 0

    def _search(
        self, problem: Problem, start: Solution, whole_model: Validation
    ) -> tuple[None, Took, int]:
        """Two rounds over one batch of spaces of each shape, counted for all of them."""
        took = whole_model.dense + whole_model.of(
            self.amounts.search_validations(problem.spaces)
        )
        rounds = self.amounts.search_rounds
        if not rounds:
            return None, took, 0
        spaces, pattern = problem.spaces, problem.pattern
        shapes = {n: segments_of(of, pattern).shape for n, of in spaces.items()}
        tables = 4 * sum(shape.numel() for shape in shapes.values())
        measured, probed = set(), 0
        for names in alike({name: shape[1:] for name, shape in shapes.items()}):
            shape = shapes[names[0]][1:]
            if shape in measured:
                continue
            measured.add(shape)
            # A GPU does many spaces as fast as one; a CPU one after the other.
            some = names if problem.device.type == "cuda" else names[:1]
            found = rounds_of_all(
                {name: spaces[name] for name in some},
                pattern,
                self.settings.seed,
                problem.device,
            )
            _, begin = self.meter.took(partial(next, found))
            _, first = self.meter.took(partial(next, found))
            # Less is left to gain in later rounds, and assignments are found sooner.
            _, later = self.meter.took(partial(next, found))
            bytes_of = {n: 4 * s.numel() for n, s in shapes.items() if s[1:] == shape}
            probed = max(probed, sum(bytes_of[name] for name in some))
            share = sum(bytes_of.values()) / sum(bytes_of[name] for name in some)
            took += (begin + first + later * (rounds - 1)) * share
        return None, took, max(0, tables - probed)

    def _fold(
        self, masks: dict[str, Tensor], comparing: Took
    ) -> tuple[None, Took, int]:
        """Fold random permutations, unfold them, and copy what is pruned."""
        model, resolved = self.model, self.plan.resolved
        perms = {}
        if self.settings.method != "identity":
            perms = {
                name: perm
                for name, perm in random_perms(resolved).items()
                if resolved.spaces[name].family in self.settings.spaces
            }
        row = self.amounts.row
        _, took = self.meter.took(
            lambda: fold_model(model, resolved, perms, None, row, write_in_place)
        )
        fold(model, resolved, invert_all(perms))

        def copied() -> None:
            for name in self.plan.prunable:
                mask = masks[name].to(self.meter.device)
                Student(model, {name: mask})

        if self.settings.prune and not self.settings.recover.stages:
            took += self.meter.took(copied)[1]
        return None, took + comparing, 0

    def _save(self, masks: dict[str, Tensor]) -> tuple[None, Took, int]:
        settings, linears = self.settings, self.plan.prunable
        took = saving(self.model, linears, masks, settings, self.folder, self.meter)
        return None, took, 0
