# SPDX-License-Identifier: Apache-2.0
"""
The whole method: statistics, scores, search, what stays dense, learning, fold, masks,
recovery.

``permute_and_prune`` is these stages, one after the other.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor, nn

from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.budget.record import BudgetRecord
from nm_permute_plugin.pruning.clock import Clock, environment
from nm_permute_plugin.pruning.data import Data, endless
from nm_permute_plugin.pruning.figures import Figures, figures_of
from nm_permute_plugin.pruning.folding import fold_model
from nm_permute_plugin.pruning.learn.layerwise import Hold
from nm_permute_plugin.pruning.learn.sharded import (
    ShardedProblem,
    refuse_alone,
)
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.recover.rounding import Rounding
from nm_permute_plugin.pruning.recover.sharded import distill_in_shards
from nm_permute_plugin.pruning.recover.stages import StageRecord, recover
from nm_permute_plugin.pruning.recover.student import Student
from nm_permute_plugin.pruning.resuming import goes_on
from nm_permute_plugin.pruning.running.backward import own_micro_batches
from nm_permute_plugin.pruning.running.compiled import compiled_elementwise
from nm_permute_plugin.pruning.running.decoder_layers import decoder_layers
from nm_permute_plugin.pruning.running.fast_dtype import computing_fast
from nm_permute_plugin.pruning.running.masked import evaluating
from nm_permute_plugin.pruning.search import History
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.pruning.solving import (
    find_within_budget,
    learned_from,
    searched_start,
)
from nm_permute_plugin.pruning.targets import refuse_sparse
from nm_permute_plugin.specs.fold import Write, write_in_place
from nm_permute_plugin.specs.moving import moved_along
from nm_permute_plugin.specs.spec import ResolvedSpec


@dataclass
class Record:
    """
    What a run did, with its figures.

    :param perms: by space, ``new[j] = old[perm[j]]``
    :param fold_error: relative change of the dense outputs by the fold, on a sample
    :param figures: what the masks keep and change, linear by linear
    :param seconds: by stage
    :param memory: the most bytes that were held, by stage: see ``clock.Clock``
    :param environment: the machine that the run ran on
    :param searched: the validations of the search
    :param history: the validations of the last of search and learning
    :param recovered: what each stage of the recovery did
    :param budget: what stays dense, and what it is worth; None without a budget
    """

    perms: dict[str, Permutation]
    fold_error: float
    figures: Figures
    seconds: dict[str, float]
    memory: dict[str, int]
    environment: dict[str, str | int]
    searched: History
    history: History
    recovered: list[StageRecord] = field(default_factory=list)
    budget: BudgetRecord | None = None

    def __repr__(self) -> str:
        """The main figures, in a line."""
        before, after = self.retained
        return (
            f"Record({len(self.perms)} permutations, {before:.1%} -> {after:.1%} of the "
            f"score kept, the fold moved the outputs by {self.fold_error:.1e}, "
            f"{sum(self.seconds.values()):.1f} s)"
        )

    @property
    def retained(self) -> tuple[float, float]:
        """
        The share of the total score that the masks keep: of the channels as they were,
        without multipliers, and of what was found.
        """
        return self.figures.retained

    @property
    def dense_linears(self) -> set[str]:
        """The linears that stay dense by the budget, of those that were to be pruned."""
        return set() if self.budget is None else self.budget.dense_linears


def permute_and_prune(
    model: nn.Module,
    resolved: ResolvedSpec,
    prunable: Sequence[str],
    data: Data,
    settings: Settings,
    write: Write = write_in_place,
    hold: Hold = nullcontext,
    roundings: Mapping[str, Rounding] | None = None,
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
    :param roundings: by linear, how its weight will be served: recovery runs, and is
        judged, with rounded weights; what is written is not rounded. A model in shards is
        recovered without
    :raises ValueError: for a model that is sparse already, for bad statistics, for outputs
        that are not finite, and for a recovery that cannot run
    :raises RuntimeError: if the fold changes the function of the model
    """
    refuse_sparse(model, prunable, settings.pattern)
    learns_layers = settings.method == "learned" and settings.layer_wise
    if learns_layers or "blocks" in settings.recover.stages:
        decoder_layers(model, prunable)  # refuses before the work, not after
    if settings.memory.shard:
        refuse_alone()
        with evaluating(model), Clock(ranks.device()) as clock:
            return _run_sharded(model, resolved, prunable, data, settings, write, clock)
    device, steps = next(model.parameters()).device, settings.training_steps
    with (
        evaluating(model),
        computing_fast(model),
        compiled_elementwise(model, steps),
        Clock(device) as clock,
    ):
        rounded = roundings or {}
        return _run(
            model, resolved, prunable, data, settings, write, hold, rounded, clock
        )


def _run(
    model: nn.Module,
    resolved: ResolvedSpec,
    prunable: Sequence[str],
    data: Data,
    settings: Settings,
    write: Write,
    hold: Hold,
    roundings: Mapping[str, Rounding],
    clock: Clock,
) -> Record:
    """The stages, one after the other."""
    problem, found, searched, history, budget = find_within_budget(
        model, resolved, prunable, data, settings, hold, clock
    )
    if budget is not None:
        prunable = [n for n in prunable if n not in budget.dense_linears]
    masks = problem.masks(found)
    figures = figures_of(problem, found, masks, prunable)
    teacher, known = problem.teacher, problem.known
    if goes_on() and settings.recover.stages:
        _see_again(problem, settings)
    del problem  # and with it all scores
    fold_error = fold_model(model, resolved, found.perms, teacher, data.train[0], write)
    clock.lap("fold")
    recovered: list[StageRecord] = []
    if settings.prune:
        masks = moved_along(model, resolved, masks, found.perms)
        if settings.recover.stages and prunable:
            with hold():
                student = _student(model, masks, prunable, roundings)
                known = " ".join([known, *sorted(set(map(repr, roundings.values())))])
                recovered = recover(student, teacher, data, settings, known)
                clock.lap("recover")
                student.write(write)
        else:
            for name in prunable:  # never two copies of the whole model
                _student(model, masks, [name]).write(write)
        clock.lap("prune")
    return Record(
        found.perms,
        fold_error,
        figures,
        clock.seconds,
        clock.memory,
        _environment(model),
        searched,
        history,
        recovered,
        budget,
    )


def _run_sharded(
    model: nn.Module,
    resolved: ResolvedSpec,
    prunable: Sequence[str],
    data: Data,
    settings: Settings,
    write: Write,
    clock: Clock,
) -> Record:
    """The stages with a twin in shards; the model itself changes on the first rank."""
    problem = ShardedProblem.of_shards(model, resolved, prunable, data, settings)
    clock.lap("statistics")
    scored = problem.with_scores(model) if ranks.is_first() else problem
    start, searched = searched_start(problem, settings, clock, scored.spaces)
    found, history = learned_from(problem, start, searched, settings, clock)
    del problem
    masks: Mapping[str, Tensor] = {}

    def folded() -> tuple[Figures, float, dict[str, Permutation]]:
        nonlocal masks
        on_cpu = Solution(
            {name: perm.cpu() for name, perm in found.perms.items()},
            {name: value.cpu() for name, value in found.multipliers.items()},
        )
        masks = scored.masks(on_cpu)
        figures = figures_of(scored, on_cpu, masks, prunable)
        perms, sample = on_cpu.perms, data.train[0]
        error = fold_model(model, resolved, perms, None, sample, write)
        masks = moved_along(model, resolved, masks, perms)
        return figures, error, perms

    figures, error, perms = ranks.of_first(folded)
    del scored
    clock.lap("fold")
    recovered: list[StageRecord] = []
    if settings.prune:
        recovered = _pruned_in_shards(model, prunable, masks, data, settings, write)
        clock.lap("recover" if recovered else "prune")
    measured = clock.seconds, clock.memory, _environment(model)
    return Record(perms, error, figures, *measured, searched, history, recovered)


def _pruned_in_shards(
    model: nn.Module,
    prunable: Sequence[str],
    masks: Mapping[str, Tensor],
    data: Data,
    settings: Settings,
    write: Write,
) -> list[StageRecord]:
    """Prune the first rank's model, whose masks it has, perhaps with a recovery."""

    def student(name: str) -> Student:
        return _student(model, masks, [name])

    def store(name: str, value: Tensor) -> None:
        one = student(name)
        one.values[f"{name}.weight"] = value
        one.write(write)

    def kept_weight(name: str) -> Tensor:
        return student(name).values[f"{name}.weight"]

    if settings.recover.stages:
        parts = kept_weight, store, data, settings
        return [distill_in_shards(model, prunable, *parts)]
    if ranks.is_first():
        for name in prunable:
            student(name).write(write)
    ranks.wait()
    return []


def _see_again(problem: Problem, settings: Settings) -> None:
    """
    Let the teacher keep what it keeps of the model before the fold in an undisturbed run.

    The folded model gives the same up to rounding, and recovery would round otherwise.
    """
    if settings.method == "identity":
        return
    data, teacher = problem.data, problem.teacher
    for turn, batch in enumerate(data.validation):
        teacher(ranks.own_part(batch, turn)[0])
    if settings.method == "learned" and not settings.layer_wise:
        steps = sum(steps for _, steps in settings.learn.schedule())
        order = dict.fromkeys(islice(endless(len(data.train), settings.seed), steps))
        size = settings.memory.micro_batch_size
        for turn, index in enumerate(order):
            for part, _ in own_micro_batches(data.train[index], turn, size):
                teacher.known(part)


def _environment(model: nn.Module) -> dict[str, str | int]:
    """The machine, and whether a run that died went on."""
    return environment(model) | ({"resumed": "yes"} if goes_on() else {})


def _student(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    linears: Sequence[str],
    roundings: Mapping[str, Rounding] | None = None,
) -> Student:
    device = next(model.parameters()).device
    moved = {name: masks[name].to(device) for name in linears}
    return Student(model, moved, roundings)
