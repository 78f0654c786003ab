# SPDX-License-Identifier: Apache-2.0
"""A budget leaves dense what costs most, whole groups, and no more than it says."""

import pytest
import torch
import whole_runs
from kernel_tables import keep
from loguru import logger

import nm_permute_plugin as nmp
from nm_permute_plugin.pruning import pipeline, solving
from nm_permute_plugin.pruning.budget.choice import CURVE
from nm_permute_plugin.pruning.run import PrunePlan

SHAPES = ("64x32", "32x32", "96x32", "32x48")


@pytest.fixture
def tables(tmp_path):
    """What serving measured for a tiny model: the last of its shapes is slower sparse."""
    for shape, dense, sparse in zip(SHAPES, (8, 4, 9, 5), (5, 2.5, 5, 6), strict=True):
        keep(tmp_path, shape, dense=dense, sparse=sparse, dtype="float32")
    return str(tmp_path)


def zeros(model):
    """The share of zeros in every linear but the head."""
    return {
        name: float((model.get_submodule(name).weight == 0).float().mean())
        for name in whole_runs.linears(model)
    }


@pytest.mark.parametrize("method", ["learned", "search", "identity"])
def test_whole_groups_stay_dense_within_a_share(tiny_model, go, method):
    model = tiny_model("llama")
    record = go(model, method=method, budget={"dense_share": 0.3})
    budget, found = record.budget, zeros(model)
    assert 0 < budget.chosen.dense_share <= 0.3
    for group in budget.groups:
        assert {found[name] for name in group.linears} == (
            {0.0} if group.stays_dense else {0.5}
        )
    assert record.dense_linears == {name for name in found if found[name] == 0}
    assert {one.name for one in record.figures.linears} == {
        name for name in found if found[name] == 0.5
    }
    # What is left does not fit any more.
    whole = sum(group.weights for group in budget.groups)
    left = (0.3 - budget.chosen.dense_share) * whole
    assert all(g.weights > left for g in budget.groups if not g.stays_dense)


def test_those_stay_dense_first_that_cost_most_for_their_size(tiny_model, go):
    budget = go(
        tiny_model("llama"), method="identity", budget={"dense_share": 0.5}
    ).budget
    best = max(budget.groups, key=lambda group: group.share / group.weights)
    assert best.stays_dense
    losses = [point.validation for point in budget.curve]
    shares = [point.dense_share for point in budget.curve]
    assert shares == sorted(shares)
    assert len(budget.curve) == len(CURVE) + 1  # the last of them is the choice
    assert losses[0] == max(losses)
    assert budget.curve[0].dense_share == 0
    assert losses[-1] < 0.7 * losses[0]
    assert budget.dense_loss == pytest.approx(0, abs=1e-6)


def test_as_few_stay_dense_as_a_loss_allows(tiny_model, go):
    sparse = go(
        tiny_model("llama"), method="identity", budget={"dense_share": 0.01}
    ).budget.curve[0]
    limit = sparse.validation / 2
    record = go(
        tiny_model("llama"), method="identity", budget={"max_loss_increase": limit}
    )
    budget = record.budget
    assert budget.chosen.validation <= limit < sparse.validation
    # With the least worthy of those that stay dense sparse, the limit is passed.
    dense = [g for g in budget.groups if g.stays_dense]
    last = min(dense, key=lambda g: g.share / g.weights)
    share = budget.chosen.dense_share - last.weights / sum(
        g.weights for g in budget.groups
    )
    fewer = go(
        tiny_model("llama"), method="identity", budget={"dense_share": share + 1e-9}
    ).budget
    assert fewer.chosen.dense_share == pytest.approx(share)
    assert fewer.chosen.validation > limit


def test_no_linear_stays_dense_where_nothing_must(tiny_model, go):
    model = tiny_model("llama")
    record = go(model, method="identity", budget={"max_loss_increase": 1e3})
    assert record.dense_linears == set()
    assert set(zeros(model).values()) == {0.5}


def test_all_may_stay_dense_and_that_is_told(tiny_model, go):
    model, said = tiny_model("llama"), []
    handler = logger.add(said.append, level="WARNING")
    try:
        record = go(
            model,
            method="identity",
            budget={"max_loss_increase": 1e-9},
            recover={"stages": ["end_to_end"]},
        )
    finally:
        logger.remove(handler)
    assert set(zeros(model).values()) == {0.0}
    assert record.retained == (1.0, 1.0)
    assert "nothing is pruned" in "".join(said)


def test_the_rest_is_as_fast_as_asked_for(tiny_model, go, tables):
    budget = {"min_speedup": 1.2, "kernels": tables, "tokens": 1}
    record = go(tiny_model("llama"), method="identity", budget=budget).budget
    assert record.chosen.speedup >= 1.2
    down = [g for g in record.groups if g.linears[0].endswith("down_proj")]
    assert [(g.dense, g.fastest) for g in down] == [(5.0, 5.0)] * 2
    assert all(g.stays_dense for g in down)  # sparse would be slower there
    taken = [g.dense if g.stays_dense else g.fastest for g in record.groups]
    assert record.chosen.speedup == pytest.approx(52 / sum(taken))
    # To leave one more of them dense would be too slow.
    saved = [g.dense - g.fastest for g in record.groups if not g.stays_dense]
    assert 52 / (sum(taken) + min(saved)) < 1.2


def test_a_speed_that_cannot_be_had_is_refused_before_the_work(tiny_model, tables):
    settings = whole_runs.settings_of(
        "search", budget={"min_speedup": 2, "kernels": tables, "tokens": 1}
    )
    with pytest.raises(ValueError, match=r"cannot be reached.* 1\.49 times as fast"):
        PrunePlan.of(tiny_model("llama"), settings)


def test_recovery_trains_what_stays_sparse_alone(tiny_model, go):
    dense, model = tiny_model("llama"), tiny_model("llama")
    record = go(
        model,
        method="identity",
        budget={"dense_share": 0.3},
        recover={"stages": ["end_to_end"], "end_to_end": {"steps": 6, "rate": 0.01}},
    )
    assert record.recovered[0].kept
    for name, share in zeros(model).items():
        before, after = (m.get_submodule(name).weight for m in (dense, model))
        assert torch.equal(before, after) == (name in record.dense_linears)
        assert (share == 0.5) == (name not in record.dense_linears)


def test_a_run_that_died_after_the_choice_takes_it_again(
    tiny_model, go, tmp_path, monkeypatch
):
    def run(model):
        settings = {"budget": {"dense_share": 0.3}, "recover": ["rescale"]}
        return go(model, method="search", **settings)

    expected = tiny_model("llama")
    record = run(expected)
    folder = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "recover", _interrupt)
        with pytest.raises(KeyboardInterrupt), nmp.resuming(folder):
            run(tiny_model("llama"))
    monkeypatch.setattr(solving, "choose_dense", _interrupt)
    model = tiny_model("llama")
    with nmp.resuming(folder):
        assert run(model).budget == record.budget
    whole_runs.assert_same(
        whole_runs.weights_of(model), whole_runs.weights_of(expected)
    )


def _interrupt(*arguments, **options):
    raise KeyboardInterrupt
