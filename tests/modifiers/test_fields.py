# SPDX-License-Identifier: Apache-2.0
"""The fields of a recipe: what survives it, what is refused, and one set of defaults."""

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


def learn(*stages: str, **groups: object) -> dict[str, Any]:
    return {"learn": {"stages": list(stages)} | groups}


UNREAD = {
    "learning without learning": (
        {"method": "search", "learn": {"steps": 3}},
        "learn is set, and nothing reads it with method: search",
    ),
    "identity learns nothing": (
        {"method": "identity", "learn": {"steps": 3}},
        "learn is set, and nothing reads it with method: identity",
    ),
    "identity searches nothing": (
        {"method": "identity", "search": {"rounds": 3}},
        "search is set, and nothing reads it with method: identity",
    ),
    "identity permutes nothing": (
        {"method": "identity", "spaces": ["hidden"]},
        "spaces is set, and nothing reads it with method: identity",
    ),
    "identity has no loss": (
        {"method": "identity", "loss": {"hidden": 1}},
        "loss is set, and nothing reads it with method: identity",
    ),
    "identity has no steps": (
        {"method": "identity", "memory": {"micro_batch_size": 2}},
        "memory is set, and nothing reads it with method: identity",
    ),
    "the search has no steps": (
        {"method": "search", "memory": {"gradient_checkpointing": True}},
        "memory is set, and nothing reads it with method: search",
    ),
    "blocks have no steps in parts": (
        {"method": "search", "recover": "blocks", "memory": {"micro_batch_size": 2}},
        "memory is set, and nothing reads it with method: search",
    ),
    "layers one by one": (
        {"objective": "layer_wise", "memory": {"gradient_checkpointing": True}},
        "memory is set.*which has one layer at a time in memory",
    ),
    "parts of layers one by one": (
        {"objective": "layer_wise", "memory": {"micro_batch_size": 2}},
        "memory is set.*which has one layer at a time in memory",
    ),
    "the search validates at rounds of its own": (
        {"method": "search", "validation": {"every": 5}},
        "validation.every is set, and nothing reads it with method: search",
    ),
    "blocks validate at epochs": (
        {"method": "identity", "recover": "blocks", "validation": {"every": 5}},
        "validation.every is set, and nothing reads it with method: identity",
    ),
    "multipliers alone": (
        learn("swaps", multipliers={"rate": 0.5}),
        r"learn.multipliers is set, and nothing reads it with stages: \['swaps'\]",
    ),
    "swaps of the default": (
        {"learn": {"swaps": {"share": 0.5}}},
        r"learn.swaps is set, and nothing reads it with stages: \['multipliers'\]",
    ),
    "logits without places": (
        learn("swaps", published={"rate": 0.02}),
        "learn.published is set",
    ),
    "swaps without swaps": (
        learn("soft", "multipliers", swaps={"row_limit": 5}),
        "learn.swaps is set",
    ),
    "two sizes of a block": (
        learn("swaps", swaps={"block_size": 16, "blocks_per_space": 2}),
        "block_size is set, and nothing reads it with blocks_per_space: 2",
    ),
    "two sizes of a published block": (
        learn("soft", published={"block_size": 16, "blocks_per_space": 2}),
        "block_size is set, and nothing reads it with blocks_per_space: 2",
    ),
    "no blocks": (
        {"recover": {"stages": ["rescale"], "blocks": {"window": 2}}},
        r"recover.blocks is set, and nothing reads it with stages: \['rescale'\]",
    ),
    "no recovery": (
        {"recover": {"blocks": {"window": 2}}},
        r"recover.blocks is set, and nothing reads it with stages: \[\]",
    ),
    "no distillation": (
        {"recover": {"stages": ["blocks"], "end_to_end": {"steps": 2}}},
        "recover.end_to_end is set",
    ),
}
NO_SENSE = {
    "3:2 keeps more than there are": ({"mask_structure": "3:2"}, "0 < N < M"),
    "2:0 has no group": ({"mask_structure": "2:0"}, "0 < N < M"),
    "0:4 keeps nothing": ({"mask_structure": "0:4"}, "0 < N < M"),
    "4:4 prunes nothing": ({"mask_structure": "4:4"}, "0 < N < M"),
    "words are no pattern": ({"mask_structure": "two of four"}, "form 'N:M'"),
    "a block cuts a group": (learn("swaps", swaps={"block_size": 6}), "of M=4"),
    "a block cuts an 8": (
        {"mask_structure": "4:8"} | learn("soft", published={"block_size": 12}),
        "learn.published.block_size=12 must be a multiple of M=8",
    ),
    "the temperature rises": (
        learn("soft", published={"temperature": [0.1, 0.2]}),
        r"temperature=\[0.1, 0.2\] rises",
    ),
    "no loss": ({"loss": {"divergence": 0}}, "all weights of the loss are 0"),
    "nothing to do": (
        {"method": "identity", "prune": False},
        "identity with prune: false would change nothing",
    ),
    "scores of another's mask": (
        {"prune": False},
        "a mask that another modifier makes",
    ),
    "multipliers before a permutation": (
        learn("multipliers", "swaps"),
        "name them last",
    ),
    "steps of a stage that is not there": (
        {"learn": {"steps": [1, 2]}},
        "must be one number, or one for each",
    ),
    "a stage of learning twice": (learn("swaps", "swaps"), "names a stage twice"),
    "no stage of learning": (learn(), "learn.stages"),
    "an unknown stage of learning": (learn("magic"), "learn.stages"),
    "a recovery without a mask": (
        {"method": "search", "recover": ["blocks"], "prune": False},
        "there is no mask whose kept",
    ),
    "recover: none of before": ({"recover": "none"}, "leave `recover` out"),
    "a stage twice": ({"recover": ["blocks", "blocks"]}, "names a stage twice"),
    "an unknown stage": ({"recover": ["magic"]}, "recover.stages"),
    "no window": ({"recover": {"blocks": {"window": 0}}}, "recover.blocks.window"),
    "a rate of 0": ({"recover": {"blocks": {"rate": 0}}}, "recover.blocks.rate"),
    "an infinite rate": (
        {"recover": {"end_to_end": {"rate": float("inf")}}},
        "recover.end_to_end.rate",
    ),
    "a format that stores 2:4": (
        {"mask_structure": "4:8", "format": "sparse-24-bitmask"},
        "2:4 only, not 4:8",
    ),
    "an unknown format": ({"format": "sparse"}, "format"),
    "a part larger than the batch": (
        {"memory": {"micro_batch_size": 9}},
        "memory.micro_batch_size=9 is above batch_size=8",
    ),
    "an unknown objective": ({"objective": "blocks"}, "'end_to_end' or 'layer_wise'"),
    "an unknown method": ({"method": "magic"}, "'learned', 'search' or 'identity'"),
    "an unknown score": ({"score": "taste"}, "score"),
    "an unknown space": ({"spaces": ["query"]}, "spaces"),
    "no spaces": ({"spaces": []}, "spaces"),
    "no targets": ({"targets": []}, "targets"),
    "no swaps": (learn("swaps", swaps={"share": 0}), "learn.swaps.share"),
    "no steps": ({"learn": {"steps": 0}}, "learn.steps"),
    "a temperature of 0": (
        learn("soft", published={"temperature": [1, 0]}),
        "learn.published.temperature",
    ),
    "a negative weight": ({"loss": {"hidden": -1}}, "loss.hidden"),
    "all rows validate": ({"validation": {"share": 1}}, "validation.share"),
    "a misspelt field": ({"learning_rat": 0.1}, "learning_rat\n"),
    "a misspelt field of a group": ({"learn": {"step": 1}}, "learn.step\n"),
}


@pytest.mark.parametrize(("body", "message"), UNREAD.values(), ids=UNREAD)
def test_settings_that_nothing_would_read_are_refused(
    body: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        LearnablePermutationModifier(**body)


@pytest.mark.parametrize(("body", "message"), NO_SENSE.values(), ids=NO_SENSE)
def test_fields_that_make_no_sense_are_refused(
    body: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        LearnablePermutationModifier(**body)


@pytest.mark.parametrize(
    "body",
    [
        {"method": "identity", "recover": "blocks", "loss": {"hidden": 1}},
        {
            "method": "identity",
            "recover": "end_to_end",
            "memory": {"micro_batch_size": 2},
            "validation": {"every": 5},
        },
        {
            "objective": "layer_wise",
            "recover": "end_to_end",
            "memory": {"gradient_checkpointing": True},
        },
        {"method": "search", "search": {"rounds": 0}, "loss": {"cosine": 1}},
        {"prune": False} | learn("swaps"),
        # No M but 2, 4, 8 ... divides the default size of a block.
        {"mask_structure": "3:6", "method": "search"},
        {"mask_structure": "1:3"} | learn("swaps"),
    ],
    ids=str,
)
def test_what_makes_sense_is_taken(body: dict[str, Any]) -> None:
    LearnablePermutationModifier(**body)
