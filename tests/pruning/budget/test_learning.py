# SPDX-License-Identifier: Apache-2.0
"""Under a budget the choice comes first, and then the masks of the rest are learned."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import whole_runs
from torch.nn import functional

import nm_permute_plugin as nmp
from nm_permute_plugin.pruning import solving
from nm_permute_plugin.pruning.budget.record import BudgetRecord, Point
from nm_permute_plugin.pruning.learn.loop import learn
from nm_permute_plugin.pruning.problem import Problem
from nm_permute_plugin.pruning.search import search_problem

MULTIPLIERS = {"stages": "multipliers", "steps": 4}
SHARE = {"dense_share": 0.3}


@pytest.fixture
def model(tiny_model):
    """A model whose outputs are far from uniform, so that masks cost something."""
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


@pytest.fixture
def learned(go):
    """A factory: the record of a run that learns on a copy of a model, and the copy."""

    def run(model, **changes):
        ours = deepcopy(model)
        given = {"learn": MULTIPLIERS, "validation": {"every": 2}} | changes
        return go(ours, method="learned", **given), ours

    return run


def divergence(dense, pruned, data):
    """The mean KL divergence of a token of the validation data, in float64."""
    total = count = 0
    for batch in data.validation:
        with torch.no_grad():
            logs = [m(**batch).logits.double().log_softmax(-1) for m in (dense, pruned)]
        each = functional.kl_div(logs[1], logs[0], reduction="none", log_target=True)
        total += each.sum()
        count += batch["input_ids"].numel()
    return float(total / count)


def test_the_choice_is_the_one_under_the_searchs_masks(model, learned, go):
    record, _ = learned(model, budget=SHARE)
    searched = go(deepcopy(model), method="search", budget=SHARE)
    ours, theirs = record.budget, searched.budget
    assert replace(ours, learned=[]) == theirs
    assert ours.reached == min(entry["validation"] for entry in record.history)
    assert ours.reached < theirs.reached == theirs.chosen.validation
    (point,) = ours.learned
    assert (point.dense_share, point.validation) == (
        ours.chosen.dense_share,
        ours.reached,
    )


@pytest.mark.parametrize("stages", ["multipliers", "swaps", "soft"])
def test_what_stays_sparse_is_learned_alone(model, learned, data, stages):
    of = {"block_size": 16}
    groups = {"multipliers": {}, "swaps": {"swaps": of}, "soft": {"published": of}}
    fields = {"stages": stages, "steps": 4, **groups[stages]}
    record, ours = learned(model, budget=SHARE, learn=fields)
    settings = whole_runs.settings_of("learned", learn=fields, validation={"every": 2})
    prunable = whole_runs.linears(model)
    resolved = whole_runs.resolved_of(model, prunable)
    problem = Problem.prepare(model, resolved, prunable, data, settings)
    start, _ = search_problem(problem, settings)
    rest = problem.only(set(prunable) - record.dense_linears)
    found, history = learn(rest, start, settings)
    assert history == record.history
    masks = rest.masks(found)
    assert set(masks) == {one.name for one in record.figures.linears}
    assert all(one.cost_after is not None for one in record.figures.linears)
    # Every space keeps a permutation, those whose consumers all stay dense the search's.
    assert set(record.perms) == set(problem.spaces)
    for name, perm in record.perms.items():
        expected = found.perms if name in rest.spaces else start.perms
        assert torch.equal(perm, expected[name])
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_submodule(name).weight.mul_(mask)
    nmp.fold(model, resolved, record.perms)
    for name in prunable:
        pair = [m.get_submodule(name).weight for m in (model, ours)]
        assert torch.equal(*pair), name


def test_the_loss_after_learning_is_what_was_asked_for(model, learned, data):
    free, _ = learned(model)
    every = min(entry["validation"] for entry in free.history)
    record, ours = learned(model, budget={"max_loss_increase": 0.5 * every})
    budget = record.budget
    first, *_, last = budget.learned
    assert (first.dense_share, first.validation) == (0, every)
    shares = [point.dense_share for point in budget.learned]
    assert shares == sorted(set(shares))
    assert 0 < last.dense_share < 1
    assert not budget.is_exceeded
    assert budget.reached == last.validation <= 0.5 * every + budget.dense_loss
    assert divergence(model, ours, data) == pytest.approx(budget.reached, rel=1e-4)
    assert set(record.seconds) >= {"search", "budget", "learn"}


def test_what_learning_leaves_of_a_loss_is_expected_by_what_it_left() -> None:
    whole = BudgetRecord("max_loss_increase", 0.1, 0.5, Point(0.0, 0.5 + 0.8))
    learned = whole.after_learning(0.5 + 0.4)
    assert learned.expected(0.8) == pytest.approx(0.4)
    assert learned.expected(0.1) == pytest.approx(0.1)  # as much as the search's masks
    assert learned.expected(0.2) == pytest.approx(0.4 / 4 ** (2 / 3))
    assert learned.expected(-0.01) == -0.01  # better than dense
    assert (learned.is_exceeded, learned.after_learning(0.59).is_exceeded) == (
        True,
        False,
    )


def test_nothing_is_learned_again_where_all_sparse_lose_little_enough(model, learned):
    free, expected = learned(model)
    record, ours = learned(model, budget={"max_loss_increase": 1e3})
    assert record.dense_linears == set()
    assert record.history == free.history
    assert [point.dense_share for point in record.budget.learned] == [0]
    whole_runs.assert_same(*map(whole_runs.weights_of, (ours, expected)))


def test_a_loss_that_no_mask_keeps_leaves_all_dense(model, learned):
    record, ours = learned(model, budget={"max_loss_increase": 1e-9})
    budget = record.budget
    assert budget.chosen.dense_share == budget.learned[-1].dense_share == 1
    assert budget.reached == budget.dense_loss
    assert not budget.is_exceeded
    zeros = [(p == 0).sum() for n, p in ours.named_parameters() if n.endswith("weight")]
    assert sum(zeros) == 0


def test_a_session_learns_once_for_the_same_linears(model, learned, monkeypatch):
    sizes = []

    def counted(problem, *given):
        sizes.append(len(problem.linears))
        return learn(problem, *given)

    monkeypatch.setattr(solving, "learn", counted)
    with nmp.session():
        learned(model)
        learned(model, budget={"max_loss_increase": 1e3})
        assert sizes == [14]
        record, _ = learned(model, budget=SHARE)
        assert sizes == [14, 14 - len(record.dense_linears)]
        again, _ = learned(model, budget=SHARE, recover=["rescale"])
        assert again.dense_linears == record.dense_linears
        assert len(sizes) == 2
        learned(model, budget={"dense_share": 0.6})
        assert len(sizes) == 3
        assert sizes[2] < sizes[1]


@pytest.mark.parametrize("turn", [1, 2])
def test_a_run_that_died_goes_on_with_the_same_weights(
    model, learned, tmp_path, monkeypatch, turn
):
    free, _ = learned(model)
    every = min(entry["validation"] for entry in free.history)
    given = {"budget": {"max_loss_increase": 0.5 * every}}
    record, expected = learned(model, **given)
    turns = 0

    def interrupted(problem, start, settings):
        nonlocal turns
        turns += 1
        if turns < turn:
            return learn(problem, start, settings)

        def stop(step, learner):
            if step == 4:
                raise KeyboardInterrupt

        return learn(problem, start, settings, stop)

    folder = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(solving, "learn", interrupted)
        with pytest.raises(KeyboardInterrupt), nmp.resuming(folder):
            learned(model, **given)
    with nmp.resuming(folder):
        again, ours = learned(model, **given)
    assert again.budget == record.budget
    assert again.history == record.history
    whole_runs.assert_same(*map(whole_runs.weights_of, (ours, expected)))
