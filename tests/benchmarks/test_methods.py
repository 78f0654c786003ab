# SPDX-License-Identifier: Apache-2.0
"""Every method of the benchmark, end to end on a tiny trained model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import quality
from methods import (
    Change,
    changes_of,
    for_all,
    is_random,
    prunable,
    prune,
    settings_of,
)
from nm_permute_plugin.modifiers.fields import PermutationFields
from nm_permute_plugin.pruning.data import split_text
from nm_permute_plugin.pruning.settings import Settings
from ways import METHODS, WAYS

SMALL = for_all(
    {
        "learn.steps": 2,
        "learn.swaps.block_size": 16,
        "recover.blocks.epochs": 1,
        "recover.end_to_end.steps": 2,
    }
)
FREE = [name for name, way in WAYS.items() if not way.folded]
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
    outcome = prune(model, trained_checkpoint, method, text, settings_of(method, SMALL))
    assert_exactly(model)
    assert outcome.fold_error is not None
    assert outcome.fold_error < 1e-3


@pytest.mark.parametrize("method", FREE)
def test_unfolded_method_halves_every_linear_and_moves_no_weight(
    method: str, trained_checkpoint: Path, text
) -> None:
    dense, model = load(trained_checkpoint), load(trained_checkpoint)
    outcome = prune(model, trained_checkpoint, method, text, settings_of(method, SMALL))
    assert set(halves(model).values()) == {0.5}
    for name in prunable(model):
        ours, theirs = (m.get_submodule(name).weight for m in (model, dense))
        assert torch.equal(ours, theirs * (ours != 0))
    assert outcome.history


def test_multipliers_alone_move_no_weight_and_change_the_masks(
    trained_checkpoint: Path, text
) -> None:
    dense, plain, ours = (load(trained_checkpoint) for _ in range(3))
    changes = [*SMALL, Change.parse("all.learn.multipliers.rate=0.1")]
    outcomes = [
        prune(model, trained_checkpoint, name, text, settings_of(name, changes))
        for model, name in ((plain, "wanda"), (ours, "multipliers"))
    ]
    changed = []
    for name in prunable(ours):
        before, other, after = (
            m.get_submodule(name).weight for m in (dense, plain, ours)
        )
        assert torch.equal(after, before * (after != 0))
        changed.append(not torch.equal(other, after))
    assert any(changed)
    history = outcomes[1].history
    assert history[-1]["validation"] < history[0]["validation"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsegpt", "search+sparsegpt"])
def test_sparsegpt_updates_what_it_keeps(
    method: str, trained_checkpoint: Path, text, assert_exactly
) -> None:
    dense, model = load(trained_checkpoint), load(trained_checkpoint)
    prune(model, trained_checkpoint, method, text, settings_of(method, SMALL))
    assert_exactly(model)
    name = "model.layers.0.self_attn.q_proj"  # its rows never move
    ours, theirs = (m.get_submodule(name).weight for m in (model, dense))
    kept = ours[ours != 0]
    assert not torch.isin(kept, theirs).all()


def test_every_learned_method_takes_as_many_steps(
    trained_checkpoint: Path, text
) -> None:
    methods = ["learned", "amd-free", "free-mask"]
    outcomes = [
        prune(
            load(trained_checkpoint),
            trained_checkpoint,
            name,
            text,
            settings_of(name, SMALL),
        )
        for name in methods
    ]
    assert [outcome.batches for outcome in outcomes] == [2, 2, 2]
    assert [outcome.history[-1]["step"] for outcome in outcomes] == [2, 2, 2]


def test_recipe_python_and_benchmark_have_the_same_defaults() -> None:
    recipe = PermutationFields().settings()
    args = quality.arguments(["MODEL", "--train", "a.txt", "--test", "b.txt"])
    benchmark = settings_of("learned", quality.asked(args, seed=0))
    # The protocol's text is long: it can spare a smaller share for validation.
    shared = Settings(validation={"share": 0.01})
    assert recipe == Settings() == settings_of("learned")
    assert benchmark == shared


README = (
    "MODEL --train a.txt --test b.txt --rows 2304 --validation-share 0.02 --steps 300"
)
EFFECTIVE = {
    "wanda": {"method": "identity"},
    "search": {"method": "search"},
    "learned": {"learn": {"stages": "multipliers", "steps": 300}},
    "learned+end_to_end": {
        "learn": {"steps": 300},
        "recover": {"stages": "end_to_end", "end_to_end": {"steps": 600}},
    },
    "learned-order": {"learn": {"stages": "swaps", "steps": 300}},
    "multipliers": {
        "learn": {"stages": "multipliers", "steps": 300},
        "search": {"rounds": 0},
    },
    "amd": {
        "learn": {
            "stages": "soft",
            "steps": 300,
            "published": {
                "blocks_per_space": 4,
                "rate": 0.1,
                "weight_decay": 0.01,
                "start_logit": 0.1,
            },
        },
        "search": {"rounds": 0},
        "loss": {"divergence": 0, "cross_entropy": 1, "hidden": 1e-5},
    },
    "permllm": {
        "learn": {
            "stages": "straight_through",
            "steps": 300,
            "published": {
                "block_size": 64,
                "rate": 0.01,
                "weight_decay": 0.1,
                "sinkhorn_iterations": 5,
            },
        },
        "search": {"rounds": 0},
        "loss": {"divergence": 0, "cosine": 1},
    },
    "learned+sparsegpt": {"learn": {"stages": "swaps", "steps": 300}, "prune": False},
}


@pytest.mark.parametrize("method", EFFECTIVE)
def test_readme_command_means_what_it_meant(method: str) -> None:
    args = quality.arguments([*README.split(), "--recover-steps", "600"])
    expected = EFFECTIVE[method] | {"seed": 2, "validation": {"share": 0.02}}
    found = settings_of(method, quality.asked(args, seed=2))
    assert found == Settings.model_validate(expected)


def test_changes_stand_in_the_record(trained_checkpoint: Path, text) -> None:
    texts = ["amd.search.rounds=3", "amd.learn.published.temperature=[1.0, 0.5]"]
    changes = [*SMALL, *map(Change.parse, texts)]
    model = load(trained_checkpoint)
    settings = settings_of("amd", changes)
    used = prune(model, trained_checkpoint, "amd", text, settings).settings
    assert used["search"] == {"rounds": 3}
    assert used["learn"]["published"]["temperature"] == [1.0, 0.5]
    assert used["learn"]["published"]["rate"] == 0.1


def test_changes_are_for_one_method_or_all_that_read_them() -> None:
    texts = [
        "all.recover.end_to_end.steps=7",
        "learned.learn.multipliers.rate=0.02",
        "learned+end_to_end.seed=5",
        "all.learn.swaps.share=0.5",
    ]
    changes = [Change.parse(text) for text in texts]
    plain, recovered = (
        settings_of(name, changes) for name in ("learned", "learned+end_to_end")
    )
    assert plain == Settings(learn={"multipliers": {"rate": 0.02}})
    assert recovered.recover.end_to_end.steps == 7
    assert recovered.learn.multipliers.rate == 0.02
    assert (plain.seed, recovered.seed) == (0, 5)
    assert settings_of("wanda", changes) == settings_of("wanda")
    assert settings_of("learned-order", changes).learn.swaps.share == 0.5
    both = ["learned", "learned+end_to_end"]
    assert changes_of(both, {"seed": 1}, texts[:3])[1:] == changes[:3]
    with pytest.raises(
        ValueError, match="all.learn.swaps.share=0.5: nothing in learned"
    ):
        changes_of(both, {}, texts)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("rate=1", "changes no setting"),
        ("amd.seed", "changes no setting"),
        ("best.seed=1", "changes no setting"),
        ("amd.learn.published.rates=1", "rates"),
        ("amd.learn.published.rate=-1", "greater than 0"),
    ],
)
def test_change_of_nothing_is_refused(wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of("amd", [Change.parse(wrong)])


def test_only_plain_scores_do_not_depend_on_the_seed() -> None:
    assert [m for m in METHODS if not is_random(m)] == ["magnitude", "wanda", "ria"]
