# SPDX-License-Identifier: Apache-2.0
"""Find permutations and masks: search, choose what stays dense, learn what stays sparse."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor, nn

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.budget.choice import choose_dense, groups_of
from nm_permute_plugin.pruning.budget.record import BudgetRecord
from nm_permute_plugin.pruning.clock import Clock
from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.learn.layerwise import Hold, learn_layerwise
from nm_permute_plugin.pruning.learn.loop import learn
from nm_permute_plugin.pruning.problem import Problem, Solution, SpaceScores
from nm_permute_plugin.pruning.resuming import kept
from nm_permute_plugin.pruning.search import History, search_problem
from nm_permute_plugin.pruning.session import once
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.spec import ResolvedSpec

NOT_LEARNED_FROM = {"format", "prune", "recover", "budget"}
"""
The settings that learning does not depend on. What a budget left dense is no part of the
problem that is learned.
"""


def find_within_budget(
    model: nn.Module,
    resolved: ResolvedSpec,
    prunable: Sequence[str],
    data: Data,
    settings: Settings,
    hold: Hold,
    clock: Clock,
) -> tuple[Problem, Solution, History, History, BudgetRecord | None]:
    """
    Measure the model, search, choose what stays dense, and learn what stays sparse.

    Learned masks make up for each other's errors, and gain little where some of them are
    opened later: so the choice comes first, under the search's masks.

    :return: the problem of what stays sparse, its solution, the validations of the search,
        the last ones, and what stays dense; None of it without a budget
    """
    problem = Problem.prepare(model, resolved, prunable, data, settings)
    clock.lap("statistics")
    start, searched = searched_start(problem, settings, clock)
    groups, times = groups_of(model, resolved, prunable, settings)
    if not groups:
        found, history = learned_from(problem, start, searched, settings, clock, hold)
        return problem, found, searched, history, None
    teacher, known = problem.teacher, problem.known
    # On the CPU, because they stay while the rest is learned.
    held = {
        name: (mask.cpu(), mask.device) for name, mask in problem.masks(start).items()
    }

    def choose(before: BudgetRecord | None) -> BudgetRecord:
        def chosen() -> dict[str, Any]:
            masks = {name: mask.to(device) for name, (mask, device) in held.items()}
            given = teacher, masks, groups, times, data, settings, before
            return asdict(choose_dense(*given))

        turn = 0 if before is None else len(before.learned)
        state = kept(chosen, "choice of what stays dense", known, turn)
        return TypeAdapter(BudgetRecord).validate_python(ranks.of_first(lambda: state))

    budget: BudgetRecord | None = None
    while True:
        budget = choose(budget)
        clock.lap("budget")
        # No name for the whole problem stays: its scores may fill a GPU.
        problem = problem.only(set(prunable) - budget.dense_linears)
        found, history = learned_from(problem, start, searched, settings, clock, hold)
        if settings.method == "learned":
            budget = budget.after_learning(min(e["validation"] for e in history))
        if settings.method != "learned" or not budget.is_exceeded:
            return problem, found, searched, history, budget


def searched_start(
    problem: Problem,
    settings: Settings,
    clock: Clock,
    spaces: Mapping[str, SpaceScores] | None = None,
) -> tuple[Solution, History]:
    """
    What the search finds, with its validations; nothing where nothing is searched.

    :param spaces: of the problem, with scores for the search, where it has none
    """
    if settings.method == "identity":
        return Solution(), []
    found = search_problem(problem, settings, spaces)
    clock.lap("search")
    return found


def learned_from(
    problem: Problem,
    start: Solution,
    searched: History,
    settings: Settings,
    clock: Clock,
    hold: Hold = nullcontext,
) -> tuple[Solution, History]:
    """
    What learning makes of the search's solution, with its validations.

    :param searched: the validations of the search, the last ones where nothing is learned
    """
    if settings.method != "learned":
        return start, searched
    if not problem.spaces:
        return start, [{"step": 0, "validation": problem.validate(start)}]

    def learned() -> tuple[dict[str, dict[str, Tensor]], History]:
        if settings.layer_wise:
            found, history = learn_layerwise(problem, start, settings, hold)
        else:
            found, history = learn(problem, start, settings)
        return found.state_dict(), history

    read = settings.model_dump(exclude=NOT_LEARNED_FROM)
    state, history = once(learned, "learning", problem.known, read)
    clock.lap("learn")
    return Solution(**state), history
