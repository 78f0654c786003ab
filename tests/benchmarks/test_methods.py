# SPDX-License-Identifier: Apache-2.0
"""Every method of the benchmark, end to end on a tiny trained model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from methods import (
    AMD,
    METHODS,
    PERMLLM,
    Budget,
    Way,
    changed,
    is_random,
    parse_changes,
    prunable,
    prune,
    ways,
)
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.learn.loop import LearnSettings
from nm_permute_plugin.pruning.learn.order_shape import OrderShape
from nm_permute_plugin.pruning.recover.blocks import BlockSettings
from nm_permute_plugin.pruning.recover.distill import DistillSettings
from nm_permute_plugin.pruning.recover.stages import RecoverSettings
from nm_permute_plugin.pruning.text import split_text

OURS = LearnSettings(order_share=0.5, shape=OrderShape(block_size=16, multipliers=True))
BUDGET = Budget(
    NMPattern(2, 4),
    steps=2,
    seed=0,
    ours=OURS,
    recover=RecoverSettings(
        blocks=BlockSettings(epochs=1), distill=DistillSettings(steps=2)
    ),
)
FREE = [name for name, way in ways(OURS).items() if not way.folded]
FOLDED = [
    name
    for name in METHODS
    if name not in FREE and "sparsegpt" not in name and name != "wanda+blocks"
]


@pytest.fixture
def text(chain_rows: Callable):
    return split_text(list(chain_rows(24, 32, seed=999)), 4, 0.1, 0)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def halves(model) -> dict[str, float]:
    """The share of zeros of every linear that is pruned."""
    return {
        name: float((model.get_submodule(name).weight == 0).float().mean())
        for name in prunable(model)
    }


@pytest.mark.parametrize("method", FOLDED)
def test_folded_method_leaves_the_pattern(
    method: str, trained_checkpoint: Path, text, assert_exactly
) -> None:
    model = load(trained_checkpoint)
    outcome = prune(model, trained_checkpoint, method, text, BUDGET)
    assert_exactly(model)
    assert outcome.fold_error is not None
    assert outcome.fold_error < 1e-3


@pytest.mark.parametrize("method", FREE)
def test_unfolded_method_halves_every_linear_and_moves_no_weight(
    method: str, trained_checkpoint: Path, text
) -> None:
    dense, model = load(trained_checkpoint), load(trained_checkpoint)
    outcome = prune(model, trained_checkpoint, method, text, BUDGET)
    assert set(halves(model).values()) == {0.5}
    for name in prunable(model):
        ours, theirs = (m.get_submodule(name).weight for m in (model, dense))
        assert torch.equal(ours, theirs * (ours != 0))
    assert outcome.history


def test_multipliers_alone_move_no_weight_and_change_the_masks(
    trained_checkpoint: Path, text
) -> None:
    dense, plain, ours = (load(trained_checkpoint) for _ in range(3))
    budget = replace(BUDGET, ours=replace(OURS, multiplier_rate=0.1))
    prune(plain, trained_checkpoint, "wanda", text, budget)
    outcome = prune(ours, trained_checkpoint, "multipliers", text, budget)
    changed = []
    for name in prunable(ours):
        before, other, after = (
            m.get_submodule(name).weight for m in (dense, plain, ours)
        )
        assert torch.equal(after, before * (after != 0))
        changed.append(not torch.equal(other, after))
    assert any(changed)
    assert outcome.history[-1]["validation"] < outcome.history[0]["validation"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsegpt", "search+sparsegpt"])
def test_sparsegpt_updates_what_it_keeps(
    method: str, trained_checkpoint: Path, text, assert_exactly
) -> None:
    dense, model = load(trained_checkpoint), load(trained_checkpoint)
    prune(model, trained_checkpoint, method, text, BUDGET)
    assert_exactly(model)
    name = "model.layers.0.self_attn.q_proj"  # rows of q never move
    ours, theirs = (m.get_submodule(name).weight for m in (model, dense))
    kept = ours[ours != 0]
    assert not torch.isin(kept, theirs).all()


def test_amd_and_permllm_are_as_published() -> None:
    assert (AMD.shape.relaxation, AMD.shape.groups) == ("soft", 4)
    assert (AMD.loss.cross_entropy, AMD.loss.hidden) == (1.0, 1e-5)
    assert AMD.loss.divergence == PERMLLM.loss.divergence == 0
    assert PERMLLM.shape.relaxation == "straight_through"
    assert (PERMLLM.shape.block_size, PERMLLM.loss.cosine) == (64, 1.0)


def test_every_learned_method_takes_as_many_steps(
    trained_checkpoint: Path, text
) -> None:
    methods = ["learned", "amd-free", "free-mask"]
    outcomes = [
        prune(load(trained_checkpoint), trained_checkpoint, name, text, BUDGET)
        for name in methods
    ]
    assert [outcome.batches for outcome in outcomes] == [BUDGET.steps] * 3
    assert [outcome.history[-1]["step"] for outcome in outcomes] == [2, 2, 2]


def test_settings_change_where_they_stand(trained_checkpoint: Path, text) -> None:
    changes = parse_changes(["amd.groups=2", "amd.learning_rate=0.5", "amd.rounds=3"])
    way = changed(ways(OURS)["amd"], changes["amd"])
    assert (way.learn.shape.groups, way.learn.learning_rate, way.rounds) == (2, 0.5, 3)
    model = load(trained_checkpoint)
    budget = replace(BUDGET, changes=changes)
    used = prune(model, trained_checkpoint, "amd", text, budget).settings
    assert used["rounds"] == 3


@pytest.mark.parametrize("wrong", ["rate=1", "amd.rates=1", "best.learning_rate=1"])
def test_change_of_nothing_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="changes no setting"):
        parse_changes([wrong])


def test_a_word_is_a_value_too() -> None:
    changes = parse_changes(["learned.relaxation=soft"])
    assert changed(Way(), changes["learned"]).learn.shape.relaxation == "soft"


def test_only_scores_in_the_order_as_it_is_do_not_depend_on_the_seed() -> None:
    assert [m for m in METHODS if not is_random(m)] == ["magnitude", "wanda", "ria"]
