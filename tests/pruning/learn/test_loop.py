# SPDX-License-Identifier: Apache-2.0
"""Learning never loses on validation data, repeats itself, and touches no weight."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from learning import as_it_is, fast, on, text
from torch import Tensor

from nm_permute_plugin.maths.permutation import check_permutation
from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.learn import multipliers
from nm_permute_plugin.pruning.learn.loop import LEARNERS, Learner, learn
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.search import search
from nm_permute_plugin.pruning.settings import (
    LearnStage,
    LossSettings,
    Settings,
)

STAGES = get_args(LearnStage)
PERMUTATIONS = [stage for stage in STAGES if stage != "multipliers"]


@pytest.fixture
def problem(tiny_model, make_problem) -> Problem:
    """Every kind of space, with shared key/value heads."""
    data = Data(text(8, seed=1), text(4, seed=2))
    return make_problem(tiny_model("llama"), data, ["residual", "hidden.0", "value.0"])


@pytest.mark.parametrize("rows", [None, 16, 1])
def test_multipliers_of_the_scores_make_a_better_mask(
    problem: Problem, rows: int | None
) -> None:
    learn_settings = {"steps": 30, "multipliers": {"rate": 0.1, "rows": rows}}
    settings = Settings(learn=learn_settings, validation={"every": 2})
    problem = on(problem, train=text(32, seed=1))
    found, history = learn(problem, as_it_is(problem), settings)
    losses = [entry["validation"] for entry in history]
    kept = problem.validate(found)
    assert kept == pytest.approx(min(losses), rel=1e-6)
    assert kept < losses[0]
    assert any(bool((factors != 1).any()) for factors in found.multipliers.values())


def test_permutations_learn_first_then_they_stay_and_multipliers_learn(
    problem: Problem,
) -> None:
    solutions: dict[int, Solution] = {}

    def watch(step: int, learner: Learner) -> None:
        solutions[step] = learner.solution()

    settings = fast("swaps", "multipliers", steps=(3, 5), validation={"every": 1})
    start = as_it_is(problem)
    found, history = learn(problem, start, settings, watch)
    assert list(solutions) == list(range(1, 9))
    permuted = [start, *(solutions[step] for step in (1, 2, 3))]
    for old, new in pairwise(permuted):
        assert new.multipliers == {}
        assert not all(torch.equal(new.perms[n], p) for n, p in old.perms.items())
    losses = [entry["validation"] for entry in history[:4]]
    best = permuted[losses.index(min(losses))]
    for old, new in pairwise(solutions[step] for step in range(4, 9)):
        assert all(torch.equal(new.perms[n], p) for n, p in best.perms.items())
        changed = [
            torch.equal(new.multipliers[n], m) for n, m in old.multipliers.items()
        ]
        assert changed
        assert not any(changed)
    assert problem.validate(found) == pytest.approx(
        min(entry["validation"] for entry in history), rel=1e-6
    )


@pytest.mark.parametrize("stage", PERMUTATIONS)
def test_no_multipliers_are_made_where_none_learn(
    problem: Problem, stage: LearnStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*rest: object) -> None:
        raise AssertionError("multipliers are for the stage that learns them")

    monkeypatch.setattr(multipliers, "MultipliedMask", refuse)
    monkeypatch.setitem(LEARNERS, "multipliers", refuse)
    found, _ = learn(problem, as_it_is(problem), fast(stage, steps=1))
    assert found.multipliers == {}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_of_all_validations_is_kept(
    problem: Problem, stage: LearnStage, seed: int
) -> None:
    start = as_it_is(problem)
    found, history = learn(problem, start, fast(stage, seed=seed, steps=6))
    losses = [entry["validation"] for entry in history]
    kept = problem.validate(found)
    assert kept == pytest.approx(min(losses), rel=1e-6)
    assert losses[0] == pytest.approx(problem.validate(start), rel=1e-6)
    for name, perm in found.perms.items():
        check_permutation(perm)
        segment = problem.spaces[name].space.segment
        assert torch.equal(perm // segment, torch.arange(len(perm)) // segment)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_spoils_everything_is_not_kept(
    problem: Problem, stage: LearnStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a wild step on one batch does, the start is there to return to."""
    rates = {"multipliers": {"rate": 50.0}, "published": {"rate": 50.0}}
    group = {"soft": "published", "straight_through": "published"}.get(stage, stage)
    wild = {group: rates[group]} if group in rates else {}
    settings = Settings(learn={"stages": [stage], "steps": 1, **wild})
    problem = on(problem, train=text(2, seed=9))
    start = as_it_is(problem)
    found, _ = learn(problem, start, settings)
    assert problem.validate(found) <= problem.validate(start) * (1 + 1e-6)
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(Problem, "validate", lambda *rest: next(losses))
    found, _ = learn(problem, start, settings)
    assert found is start


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_seed_gives_the_same_solution(
    problem: Problem, stage: LearnStage
) -> None:
    start = as_it_is(problem)
    first, history = learn(problem, start, fast(stage))
    torch.rand(5)  # The caller's own random numbers do not count.
    again, same_history = learn(problem, start, fast(stage))
    assert history == same_history
    for name, perm in first.perms.items():
        assert torch.equal(perm, again.perms[name])
    for name, factors in first.multipliers.items():
        assert torch.equal(factors, again.multipliers[name])


def test_a_start_without_permutations_is_the_identity(problem: Problem) -> None:
    found, history = learn(problem, Solution(), fast("multipliers"))
    same, same_history = learn(problem, as_it_is(problem), fast("multipliers"))
    assert history == same_history
    assert found.perms.keys() == same.perms.keys() == problem.spaces.keys()


def test_another_seed_takes_the_batches_in_another_order(problem: Problem) -> None:
    start = as_it_is(problem)
    losses = []
    for seed in range(3):
        _, history = learn(problem, start, fast("multipliers", seed=seed))
        losses.append([entry["loss"] for entry in history[1:]])
    assert losses[0] != losses[1] or losses[0] != losses[2]


@pytest.mark.parametrize("stage", STAGES)
def test_weights_and_their_gradients_are_left_alone(
    problem: Problem, stage: LearnStage
) -> None:
    model = problem.model
    frozen_before = model.model.norm.weight
    frozen_before.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learn(problem, as_it_is(problem), fast(stage))
    after = model.state_dict()
    assert [n for n, t in before.items() if not torch.equal(after[n], t)] == []
    for parameter in model.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == (parameter is not frozen_before)
    assert [m for m in model.modules() if "forward" in m.__dict__] == []


def test_a_model_learns_offloaded_what_it_learns_in_memory(
    problem: Problem, offload_to, tmp_path
) -> None:
    start, settings = as_it_is(problem), fast("swaps", "multipliers", steps=3)
    expected, history = learn(problem, start, settings)
    offload_to(problem.model, "disk", tmp_path)
    teacher = Teacher(problem.model, problem.teacher.loss)
    found, same_history = learn(replace(problem, teacher=teacher), start, settings)
    assert history == same_history
    for name, perm in expected.perms.items():
        assert torch.equal(found.perms[name], perm)
    for name, factors in expected.multipliers.items():
        assert torch.equal(found.multipliers[name], factors)


def test_validations_are_recorded_with_their_steps_and_losses(problem: Problem) -> None:
    settings = fast("swaps", "multipliers", steps=(3, 2))
    _, history = learn(problem, as_it_is(problem), settings)
    # Every second step, and the last of each stage.
    assert [entry["step"] for entry in history] == [0, 2, 3, 4, 5]
    assert [sorted(entry) for entry in history] == [
        ["step", "validation"],
        *[["loss", "rate", "step", "validation"]] * 4,
    ]
    assert all(entry["loss"] > 0 for entry in history[1:])


def test_every_part_of_the_loss_can_be_learned_from(problem: Problem) -> None:
    loss = LossSettings(divergence=0.5, cross_entropy=0.5, hidden=1.0, cosine=1.0)
    problem = replace(problem, teacher=Teacher(problem.model, loss))
    start = as_it_is(problem)
    found, history = learn(problem, start, fast("multipliers", steps=20))
    assert history[0]["validation"] == pytest.approx(problem.validate(start), rel=1e-6)
    assert problem.validate(found) < problem.validate(start)


@pytest.mark.parametrize("stage", STAGES)
def test_masks_of_other_linears_stay_on(problem: Problem, stage: LearnStage) -> None:
    name = "model.layers.1.mlp.down_proj"
    score = problem.model.get_submodule(name).weight.detach().abs()
    with_other = replace(problem, fixed={name: score})
    start = as_it_is(problem)
    losses = []
    for each in (problem, with_other):
        found, history = learn(each, start, fast(stage, steps=1))
        assert history[0]["validation"] == pytest.approx(each.validate(start), rel=1e-6)
        losses.append(history[1]["loss"])
        assert name not in found.multipliers
    # Not only the validation knows of it: the training loss differs too.
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("missing", ["train", "validation"])
def test_missing_data_is_refused(problem: Problem, missing: str) -> None:
    problem = on(problem, **{missing: []})
    with pytest.raises(ValueError, match="data to train on and data for validation"):
        learn(problem, as_it_is(problem), fast("multipliers"))


def of_padding() -> list[Mapping[str, Tensor]]:
    """A batch without one token that counts: its mean loss is not a number."""
    (batch,) = text(2, seed=4)
    return [{**batch, "attention_mask": torch.zeros(2, 8, dtype=torch.int64)}]


def test_a_training_loss_that_is_not_finite_is_refused(problem: Problem) -> None:
    with pytest.raises(ValueError, match="training loss is nan"):
        learn(on(problem, train=of_padding()), as_it_is(problem), fast("multipliers"))
    assert all(parameter.requires_grad for parameter in problem.model.parameters())
    assert [m for m in problem.model.modules() if "forward" in m.__dict__] == []


def test_a_validation_loss_that_is_not_finite_is_refused(problem: Problem) -> None:
    broken = on(problem, validation=of_padding())
    with pytest.raises(ValueError, match="validation loss is nan"):
        learn(broken, as_it_is(problem), fast("multipliers"))


def test_the_dense_model_runs_once_a_batch_in_search_and_learning(
    problem: Problem,
) -> None:
    """In all validations and in every epoch it is the pruned model that runs."""
    runs: list[bool] = []
    down = problem.model.model.layers[0].mlp.down_proj
    problem.model.model.norm.register_forward_hook(
        lambda *rest: runs.append("forward" in down.__dict__)
    )
    perms, history = search(
        problem.spaces,
        problem.pattern,
        rounds=3,
        seed=0,
        validate=lambda perms: problem.validate(Solution(perms)),
    )
    searched = runs.count(True)
    assert searched >= len(problem.data.validation) * len(history)
    settings = fast("swaps", "multipliers", steps=8)
    _, history = learn(problem, Solution(perms), settings)
    validations = len(history) * len(problem.data.validation)
    assert runs.count(True) - searched == 2 * 8 + validations
    batches = len(problem.data.train) + len(problem.data.validation)
    assert runs.count(False) == batches
