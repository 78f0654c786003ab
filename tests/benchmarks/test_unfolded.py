# SPDX-License-Identifier: Apache-2.0
"""Orders of single linears, and masks without an order."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from methods import prunable
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.scores import magnitude
from nm_permute_plugin.pruning.learn.loop import LearnSettings
from nm_permute_plugin.pruning.learn.order_shape import OrderShape
from nm_permute_plugin.pruning.text import split_text
from unfolded import FreeMask, learn_masks, order_alone, own_spaces

PATTERN = NMPattern(2, 4)
SETTINGS = LearnSettings(
    steps=12,
    shape=OrderShape(block_size=16),
    multiplier_rate=0.1,
    evaluate_every=4,
)


@pytest.fixture
def model(trained_checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(
        trained_checkpoint, dtype=torch.float32
    ).eval()


@pytest.fixture
def text(chain_rows):
    return split_text(list(chain_rows(24, 32, seed=999)), 4, 0.2, 0)


@pytest.fixture
def scores(model):
    return {
        name: magnitude(model.get_submodule(name).weight.detach())
        for name in prunable(model)
    }


def test_every_linear_has_a_space_without_walls(scores) -> None:
    spaces = own_spaces(scores)
    assert [stack.space.consumers[0].name for stack in spaces.values()] == list(scores)
    assert all(s.space.segment == s.score.shape[1] for s in spaces.values())


@pytest.mark.parametrize("search_only", [True, False], ids=["search", "learned"])
def test_masks_are_n_of_m_under_their_own_orders(
    search_only: bool, model, text, scores
) -> None:
    found = order_alone(model, scores, text, PATTERN, 3, SETTINGS, search_only)
    for name, mask in found.masks.items():
        groups = mask[:, found.perms[f"input.{name}"]].unflatten(1, (-1, 4))
        assert (groups.sum(-1) == 2).all()


@pytest.mark.parametrize("relaxation", ["soft", "straight_through", "insertion"])
def test_orders_of_single_linears_are_learned(
    relaxation: str, model, text, scores
) -> None:
    shape = OrderShape(block_size=16, relaxation=relaxation)
    settings = LearnSettings(steps=12, learning_rate=0.1, shape=shape, evaluate_every=4)
    found = order_alone(model, scores, text, PATTERN, 0, settings)
    looks = [look["validation"] for look in found.history]
    assert min(looks) < looks[0]


def test_free_masks_are_learned_and_keep_n_of_m(model, text, scores) -> None:
    found = learn_masks(model, scores, text, PATTERN, SETTINGS)
    looks = [look["validation"] for look in found.history]
    assert [look["step"] for look in found.history] == [0, 4, 8, 12]
    assert min(looks) < 0.9 * looks[0]
    for mask in found.masks.values():
        assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_gradient_of_a_free_mask_opens_what_the_loss_wants() -> None:
    score = torch.tensor([[4.0, 3.0, 2.9, 1.0]])
    log = torch.zeros_like(score, requires_grad=True)
    mask = FreeMask.apply(score, log, PATTERN, torch.float32)
    assert torch.equal(mask.bool(), nm_mask(score, PATTERN))
    (-mask[0, 2]).backward()  # the loss falls when the third weight is kept
    assert log.grad[0, 2] < 0 < log.grad[0, 1]
