# SPDX-License-Identifier: Apache-2.0
"""The fields of a recipe: what survives it, where they moved, and one set of defaults."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from pydantic import BaseModel, ValidationError

from nm_permute_plugin.modifiers import LearnablePermutationModifier
from nm_permute_plugin.modifiers.fields import MOVED
from nm_permute_plugin.pruning.settings import Settings

PUBLISHED = {
    "block_size": 16,
    "rate": 0.5,
    "weight_decay": 0.01,
    "temperature": [0.75, 0.25],
    "start_logit": 1.5,
    "sinkhorn_iterations": 4,
}
BODIES: dict[str, dict[str, Any]] = {
    "default": {},
    "sharded": {"memory": {"shard": True}},
    "search": {
        "mask_structure": "4:8",
        "score": "ria",
        "method": "search",
        "spaces": ["hidden"],
        "targets": ["re:.*mlp.*_proj$"],
        "ignore": ["re:.*gate_proj$"],
        "prune": False,
        "spec": {"model.norm.weight": "residual", "model.layers.{i}.{a,b}.bias?": "_"},
        "batch_size": 3,
        "seed": 11,
        "search": {"rounds": 2},
        "validation": {"share": 0.25},
    },
    "swaps and multipliers": {
        "learn": {
            "stages": ["swaps", "multipliers"],
            "steps": [7, 9],
            "multipliers": {"rows": None, "rate": 0.5},
            "swaps": {"share": 0.75, "row_limit": 128, "block_size": 16},
        },
        "loss": {
            "divergence": 0.1,
            "cross_entropy": 0.2,
            "hidden": 0.3,
            "cosine": 0.4,
        },
        "validation": {"every": 5},
        "memory": {"micro_batch_size": 2, "gradient_checkpointing": True},
    },
    "swaps of a few blocks": {
        "learn": {"stages": ["swaps"], "steps": 3, "swaps": {"blocks_per_space": 2}}
    },
    "soft": {"learn": {"stages": ["soft"], "published": PUBLISHED}},
    "straight through": {
        "learn": {"stages": ["straight_through"], "published": {"blocks_per_space": 2}}
    },
    "layer-wise": {"objective": "layer_wise"},
    "sparse format": {"format": "sparse-24-bitmask"},  # stores 2:4 only
    "recover": {
        "recover": {
            "stages": ["rescale", "blocks", "end_to_end"],
            "blocks": {"window": 2, "epochs": 3, "rate": 0.05},
            "end_to_end": {"steps": 5, "rate": 0.02},
        }
    },
    "a share stays dense": {"budget": {"dense_share": 0.2}},
    "so much may be lost": {"budget": {"max_loss_increase": 0.1}},
    "so fast": {"budget": {"min_speedup": 1.3, "kernels": "tables", "tokens": 1}},
}


def leaves(of: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every setting that is no group, by the path to it."""
    for name in type(of).model_fields:
        value = getattr(of, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_every_setting_has_another_value_than_its_default_in_some_recipe() -> None:
    default = dict(leaves(Settings()))
    changed = {
        path
        for body in BODIES.values()
        for path, value in leaves(Settings.model_validate(body))
        if value != default[path]
    }
    assert changed == set(default)


def test_the_fields_of_the_modifier_are_those_of_the_settings() -> None:
    ours = set(LearnablePermutationModifier.model_fields)
    assert ours - set(Modifier.model_fields) == set(Settings.model_fields)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_settings_are_those_of_the_body(body: dict[str, Any]) -> None:
    modifier = LearnablePermutationModifier(**body)
    assert modifier.settings() == Settings.model_validate(body)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_fields_survive_yaml(body: dict[str, Any]) -> None:
    modifier = LearnablePermutationModifier(**body)
    dumped = yaml.safe_load(yaml.safe_dump(modifier.model_dump()))
    read = LearnablePermutationModifier.model_validate(dumped)
    assert read.settings() == modifier.settings()
    assert read.model_dump() == modifier.model_dump()


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_fields_survive_the_recipe_that_the_host_saves(
    body: dict[str, Any], tmp_path: Path
) -> None:
    modifier = LearnablePermutationModifier(**body)
    Recipe.from_modifiers(modifier, "prune").yaml(str(tmp_path / "recipe.yaml"))
    (read,) = Recipe.create_instance(str(tmp_path / "recipe.yaml")).modifiers
    assert type(read) is LearnablePermutationModifier
    assert read.settings() == Settings.model_validate(body)


def test_there_is_one_set_of_defaults() -> None:
    # A recipe cannot leave the whole body out: llm-compressor would not read it.
    recipe = (
        "prune_stage:\n  permutation_modifiers:\n"
        '    LearnablePermutationModifier:\n      mask_structure: "2:4"\n'
    )
    (read,) = Recipe.create_instance(recipe).modifiers
    default = Settings()
    assert read.settings() == LearnablePermutationModifier().settings() == default
    assert default == Settings.model_validate({})
    for name, group in default:
        if isinstance(group, BaseModel):
            assert group == type(group)(), name


def test_settings_never_change() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        settings.learn.steps = 1


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"targets": "Linear"}, {"targets": ["Linear"]}),
        ({"ignore": "re:.*head"}, {"ignore": ["re:.*head"]}),
        ({"spaces": "hidden"}, {"spaces": ["hidden"]}),
        ({"learn": {"stages": "swaps"}}, {"learn": {"stages": ["swaps"]}}),
        ({"recover": "blocks"}, {"recover": {"stages": ["blocks"]}}),
        (
            {"recover": ["blocks", "end_to_end"]},
            {"recover": {"stages": ["blocks", "end_to_end"]}},
        ),
        ({"recover": {"stages": "rescale"}}, {"recover": {"stages": ["rescale"]}}),
        ({"recover": []}, {}),
    ],
    ids=str,
)
def test_a_word_stands_for_a_list_of_one(
    written: dict[str, Any], meant: dict[str, Any]
) -> None:
    read = LearnablePermutationModifier(**written).settings()
    assert read == LearnablePermutationModifier(**meant).settings()


@pytest.mark.parametrize("name", MOVED)
def test_a_flat_field_of_before_is_told_its_new_place(name: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        LearnablePermutationModifier(**{name: 1})
    assert f"the field {name} has moved: write {MOVED[name]}" in str(refusal.value)


@pytest.mark.parametrize("name", MOVED)
def test_the_new_place_of_a_flat_field_is_one(name: str) -> None:
    """What stands in the message up to the first comma that is outside of braces."""
    place = MOVED[name]
    depth, end = 0, len(place)
    for at, letter in enumerate(place):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and not depth:
            end = at
            break
    assert name not in Settings.model_fields
    paths = set(dict(leaves(Settings())))
    written = yaml.safe_load(place[:end])
    assert {path for path in _paths(written) if path not in paths} == set()


def _paths(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
