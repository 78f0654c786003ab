# SPDX-License-Identifier: Apache-2.0
"""Permutations of single linears, and masks without a permutation."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from methods import prunable, settings_of
from nm_permute_plugin.pruning.data import split_text
from nm_permute_plugin.pruning.pipeline import Record, permute_and_prune
from nm_permute_plugin.pruning.settings import Settings
from unfolded import own_spaces


@pytest.fixture
def model(trained_checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(
        trained_checkpoint, dtype=torch.float32
    ).eval()


@pytest.fixture
def run(model, chain_rows):
    """A factory: prune the model, every linear by itself."""
    data = split_text(list(chain_rows(24, 32, seed=999)), 4, 0.2, 0)
    linears = prunable(model)

    def prune(settings: Settings) -> Record:
        return permute_and_prune(
            model, own_spaces(model, linears), linears, data, settings
        )

    return prune


def changed(name: str, **fields: object) -> Settings:
    """The settings of a method, some groups of them with other values."""
    dumped = settings_of(name).model_dump()
    for group, values in fields.items():
        dumped[group] |= values
    return Settings.model_validate(dumped)


def test_every_linear_has_a_space_without_borders(model) -> None:
    spaces = own_spaces(model, prunable(model)).spaces.values()
    assert [space.consumers[0].name for space in spaces] == prunable(model)
    widths = [model.get_submodule(name).in_features for name in prunable(model)]
    assert [space.segment for space in spaces] == widths


def test_masks_are_n_of_m_under_their_own_permutations(model, run) -> None:
    record = run(changed("search-free", search={"rounds": 3}))
    moved = 0
    for name in prunable(model):
        perm = record.perms[f"hidden.{name}"]
        kept = model.get_submodule(name).weight != 0
        assert (kept[:, perm].unflatten(1, (-1, 4)).sum(-1) == 2).all()
        moved += int((perm != torch.arange(len(perm))).any())
    assert moved > 0


@pytest.mark.parametrize("stage", ["soft", "straight_through", "swaps"])
def test_permutations_of_single_linears_are_learned(stage: str, run) -> None:
    group = "swaps" if stage == "swaps" else "published"
    values = {"block_size": 16} | ({} if stage == "swaps" else {"rate": 0.1})
    learn = {"stages": stage, "steps": 12, group: values}
    every = {"every": 4}
    record = run(Settings(learn=learn, search={"rounds": 0}, validation=every))
    losses = [entry["validation"] for entry in record.history]
    assert min(losses) < losses[0]


def test_free_masks_are_learned_and_keep_n_of_m(model, run) -> None:
    multipliers = {"rows": 1, "rate": 0.1}
    learn = {"steps": 12, "multipliers": multipliers}
    record = run(changed("free-mask", learn=learn, validation={"every": 4}))
    losses = [entry["validation"] for entry in record.history]
    assert [entry["step"] for entry in record.history] == [0, 4, 8, 12]
    assert min(losses) < 0.9 * losses[0]
    for name in prunable(model):
        kept = model.get_submodule(name).weight != 0
        assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()
