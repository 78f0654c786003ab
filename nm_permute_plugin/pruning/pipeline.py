# SPDX-License-Identifier: Apache-2.0
"""
The whole method: statistics, scores, search, learning, fold, masks, recovery.

``permute_and_prune`` is these stages, one after the other.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from loguru import logger
from torch import Tensor, nn

from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.pruning.data import Batch, Data, first_sample, forward, on_device
from nm_permute_plugin.pruning.learn.layerwise import Hold, learn_layerwise
from nm_permute_plugin.pruning.learn.loop import learn
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.recover.stages import StageRecord, recover
from nm_permute_plugin.pruning.recover.student import Student
from nm_permute_plugin.pruning.running.decoder_layers import decoder_layers
from nm_permute_plugin.pruning.running.loss import answer, refuse_not_finite
from nm_permute_plugin.pruning.running.masked import linear
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.search import History, Perms, search
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.conv1d import weight_of
from nm_permute_plugin.specs.exactness import fold_checked, random_perms
from nm_permute_plugin.specs.fold import (
    Write,
    fold,
    invert_all,
    moved_along,
    write_in_place,
)
from nm_permute_plugin.specs.spec import ResolvedSpec

FOLD_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest relative change of the outputs that rounding explains, by dtype; 0.05 below."""


@dataclass
class Record:
    """
    What a run did, with its figures.

    :param perms: by space, ``new[j] = old[perm[j]]``
    :param fold_error: relative change of the dense outputs by the fold, on a sample
    :param retained: share of the total score that the masks keep, before and after
    :param seconds: by stage
    :param history: the validations of the search or of the learning
    :param recovered: what each stage of the recovery did
    """

    perms: dict[str, Permutation]
    fold_error: float
    retained: tuple[float, float]
    seconds: dict[str, float]
    history: History
    recovered: list[StageRecord] = field(default_factory=list)


def permute_and_prune(
    model: nn.Module,
    resolved: ResolvedSpec,
    prunable: Sequence[str],
    data: Data,
    settings: Settings,
    write: Write = write_in_place,
    hold: Hold = nullcontext,
) -> Record:
    """
    Permute the channels, fold the permutation exactly, zero what the N:M mask drops,
    recover.

    Statistics come from the dense model. After the fold its outputs are compared with those
    before; if they differ by more than rounding explains, the fold is undone and refused.

    :param prunable: names of the linears to prune
    :param write: how a parameter's new value is stored
    :param hold: a context in which offloaded weights stay where they were fetched to;
        entered for each layer of ``objective: layer_wise``, and for all recovery
    :raises ValueError: for a model that is sparse already, for bad statistics, for outputs
        that are not finite, and for a recovery that cannot run
    :raises RuntimeError: if the fold changes the function of the model
    """
    refuse_sparse(model, prunable, settings)
    learns_layers = settings.method == "learned" and settings.layer_wise
    if learns_layers or "blocks" in settings.recover.stages:
        decoder_layers(model, prunable)  # refuses before the work, not after
    with _evaluating(model):
        return _run(model, resolved, prunable, data, settings, write, hold)


def refuse_inexact(
    model: nn.Module,
    resolved: ResolvedSpec,
    sample: Batch,
    write: Write = write_in_place,
) -> None:
    """
    Try a spec with random permutations, before any work; the weights stay as they are.

    :raises RuntimeError: if a fold changes the function of the model
    """
    perms = random_perms(resolved)
    with _evaluating(model):
        _fold(model, resolved, perms, None, sample, write)
    fold(model, resolved, invert_all(perms), write)


def refuse_sparse(
    model: nn.Module, prunable: Sequence[str], settings: Settings
) -> None:
    """
    Refuse a model whose weights are zero already where a mask would put zeros.

    :raises ValueError: naming the first linear with as many zeros as the pattern asks for
    """
    for name in prunable:
        weight = weight_of(linear(model, name))
        zeros = float((weight == 0).float().mean())
        if zeros >= 1 - settings.pattern.density:
            raise ValueError(
                f"{name} is sparse already: {zeros:.0%} of its weights are zero. Start "
                "from the dense model, or add the layer to `ignore`."
            )


def _run(
    model: nn.Module,
    resolved: ResolvedSpec,
    prunable: Sequence[str],
    data: Data,
    settings: Settings,
    write: Write,
    hold: Hold,
) -> Record:
    """The stages, one after the other."""
    clock = _Clock()
    problem = Problem.prepare(model, resolved, prunable, data, settings)
    clock.lap("statistics")
    found, history = _find(problem, settings, clock, hold)
    before = problem.retained(problem.masks(Solution()))
    masks = problem.masks(found)
    after = problem.retained(masks)
    teacher = problem.teacher
    del problem  # and with it all scores
    fold_error = _fold(model, resolved, found.perms, teacher, data.train[0], write)
    clock.lap("fold")
    recovered: list[StageRecord] = []
    if settings.prune:
        masks = moved_along(model, resolved, masks, found.perms)
        if settings.recover.stages:
            with hold():
                student = _student(model, masks, prunable)
                recovered = recover(student, teacher, data, settings)
                clock.lap("recover")
                student.write(write)
        else:
            for name in prunable:  # never two copies of the whole model
                _student(model, masks, [name]).write(write)
        clock.lap("prune")
    retained = (before, after)
    return Record(found.perms, fold_error, retained, clock.seconds, history, recovered)


def _find(
    problem: Problem, settings: Settings, clock: "_Clock", hold: Hold
) -> tuple[Solution, History]:
    """The solution by the chosen method, and its validations."""
    if settings.method == "identity":
        return Solution(), []

    def validate(perms: Perms) -> float:
        return problem.validate(Solution(perms))

    perms, history = search(
        problem.spaces,
        problem.pattern,
        settings.search.rounds,
        settings.seed,
        validate,
        problem.device,
    )
    clock.lap("search")
    found = Solution(perms)
    if settings.method == "learned":
        if settings.layer_wise:
            found, history = learn_layerwise(problem, found, settings, hold)
        else:
            found, history = learn(problem, found, settings)
        clock.lap("learn")
    return found, history


def _fold(
    model: nn.Module,
    resolved: ResolvedSpec,
    perms: Mapping[str, Permutation],
    teacher: Teacher | None,
    sample: Batch,
    write: Write,
) -> float:
    """Fold, have the teacher follow, and return the relative change of the outputs."""

    batch = on_device(first_sample(sample), model)

    def outputs() -> dict[str, Tensor]:
        found = answer(forward(model, batch))
        refuse_not_finite(found)
        return {"outputs": found}

    tolerance = FOLD_TOLERANCE.get(next(model.parameters()).dtype, 0.05)
    error = fold_checked(model, resolved, perms, outputs, tolerance, write)
    logger.info(f"Folded {len(perms)} permutations; outputs moved by {error:.1e}")
    if teacher is not None:
        teacher.fold(_entering(model, resolved, perms))
    return error


def _entering(
    model: nn.Module, resolved: ResolvedSpec, perms: Mapping[str, Permutation]
) -> Permutation | None:
    """
    The permutation of the channels that enter the output layer, if one space orders
    them.
    """
    find = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    names = {
        f"{name}.weight" for name, module in model.named_modules() if module is head
    }
    for parameter in resolved.parameters:
        if names & set(parameter.names):
            (part, *others) = parameter.matrices[0][-1]
            if others or part.heads:
                return None
            if part.space is None or part.space not in perms:
                return torch.arange(part.length)
            return perms[part.space]
    return None


def _student(
    model: nn.Module, masks: Mapping[str, Tensor], linears: Sequence[str]
) -> Student:
    device = next(model.parameters()).device
    return Student(model, {name: masks[name].to(device) for name in linears})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run the model without dropout, and give every module its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Clock:
    """Seconds by stage, one log line a stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
        logger.info(f"{stage}: {self.seconds[stage]:.1f} s")
