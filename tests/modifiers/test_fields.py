# SPDX-License-Identifier: Apache-2.0
"""The modifier's fields: what survives a recipe, and what is refused."""

from pathlib import Path

import pytest
import yaml
from llmcompressor.recipe import Recipe
from pydantic import ValidationError

from nm_permute_plugin.modifiers import LearnablePermutationModifier as Modifier
from nm_permute_plugin.modifiers.fields import OrderFields

NOT_DEFAULT = {
    "mask_structure": "4:8",
    "score": "ria",
    "method": "search",
    "spaces": ["hidden"],
    "targets": ["re:.*mlp.*_proj$"],
    "ignore": ["re:.*gate_proj$"],
    "prune": False,
    "spec": {"model.norm.weight": "residual", "model.layers.{i}.{a,b}.bias?": "_"},
    "steps": 7,
    "batch_size": 3,
    "micro_batch_size": 2,
    "gradient_checkpointing": True,
    "order_share": 0.5,
    "swaps": 0.75,
    "learning_rate": 0.5,
    "temperature_start": 0.75,
    "temperature_end": 0.25,
    "block_size": 16,
    "groups": 2,
    "relaxation": "soft",
    "start_logit": 1.5,
    "sinkhorn_iterations": 4,
    "row_limit": 128,
    "divergence_weight": 0.1,
    "cross_entropy_weight": 0.2,
    "hidden_weight": 0.3,
    "cosine_weight": 0.4,
    "weight_decay": 0.01,
    "search_rounds": 2,
    "score_multipliers": False,
    "multiplier_rows": 4,
    "multiplier_rate": 0.5,
    "validation": 0.25,
    "evaluate_every": 5,
    "seed": 11,
}

# The sparse format stores 2:4 only: it goes with no other pattern.
FORMAT = {"format": "sparse-24-bitmask"}
# Nothing recovers without pruning: these go with no prune: false.
RECOVER = {
    "recover": ["rescale", "blocks", "end_to_end"],
    "recover_window": 2,
    "recover_epochs": 3,
    "recover_steps": 5,
    "recover_blocks_rate": 0.05,
    "recover_end_to_end_rate": 0.02,
}
# Layers one by one need no help with memory.
LAYER_WISE = {"objective": "layer_wise"}
FIELDS = {
    "default": {},
    "not default": NOT_DEFAULT,
    "sparse format": FORMAT,
    "recover": RECOVER,
    "layer-wise": LAYER_WISE,
}


def test_the_table_of_other_values_names_every_field_of_ours() -> None:
    others = NOT_DEFAULT | FORMAT | RECOVER | LAYER_WISE
    assert set(others) == set(OrderFields.model_fields)
    default = Modifier()
    assert [n for n, v in others.items() if getattr(default, n) == v] == []


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_fields_survive_yaml(fields: dict[str, object]) -> None:
    modifier = Modifier(**fields)
    read = Modifier.model_validate(
        yaml.safe_load(yaml.safe_dump(modifier.model_dump()))
    )
    assert read == modifier
    assert read.model_dump() == modifier.model_dump()


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_fields_survive_the_recipe_that_the_host_saves(
    fields: dict[str, object], tmp_path: Path
) -> None:
    modifier = Modifier(**fields)
    Recipe.from_modifiers(modifier, "prune").yaml(str(tmp_path / "recipe.yaml"))
    (read,) = Recipe.create_instance(str(tmp_path / "recipe.yaml")).modifiers
    assert type(read) is Modifier
    for name in (*NOT_DEFAULT, *FORMAT, *RECOVER, *LAYER_WISE):
        assert getattr(read, name) == getattr(modifier, name), name


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="learning_rat\n"):
        Modifier(learning_rat=0.1)


REFUSED = {
    "3:2 keeps more than there are": ({"mask_structure": "3:2"}, "0 < N < M"),
    "2:0 has no group": ({"mask_structure": "2:0"}, "0 < N < M"),
    "0:4 keeps nothing": ({"mask_structure": "0:4"}, "0 < N < M"),
    "4:4 prunes nothing": ({"mask_structure": "4:4"}, "0 < N < M"),
    "words are no pattern": ({"mask_structure": "two of four"}, "form 'N:M'"),
    "a block cuts a group": ({"block_size": 6}, "multiple of M=4"),
    "a block cuts an 8": ({"block_size": 12, "mask_structure": "4:8"}, "M=8"),
    "the temperature rises": (
        {"temperature_start": 0.1, "temperature_end": 0.2},
        "temperature_end=0.2 is above temperature_start=0.1",
    ),
    "no loss": ({"divergence_weight": 0}, "all weights of the loss are 0"),
    "nothing to do": (
        {"method": "identity", "prune": False},
        "identity with prune: false would change nothing",
    ),
    "scores of another's mask": (
        {"score_multipliers": True, "prune": False},
        "a mask that another modifier makes",
    ),
    "scores without moves": (
        {"score_multipliers": True, "relaxation": "soft"},
        "needs relaxation: insertion, not soft",
    ),
    "a rate of logits that are not there": (
        {"learning_rate": 0.02},
        "learning_rate=0.02 is of logits",
    ),
    "a decay of logits that are not there": (
        {"weight_decay": 0.1},
        "weight_decay=0.1 is of logits",
    ),
    "a recovery without a mask": (
        {"recover": ["blocks"], "prune": False},
        "there is no mask whose kept",
    ),
    "an empty recovery": ({"recover": []}, "one or more stages, each once"),
    "a stage twice": ({"recover": ["blocks", "blocks"]}, "each once"),
    "an unknown stage": ({"recover": ["magic"]}, "recover"),
    "a stage that is no list": ({"recover": "blocks"}, "recover"),
    "no window": ({"recover": ["blocks"], "recover_window": 0}, "recover_window"),
    "a rate of 0": ({"recover_blocks_rate": 0}, "recover_blocks_rate"),
    "a format that stores 2:4": (
        {"mask_structure": "4:8"} | FORMAT,
        "2:4 only, not 4:8",
    ),
    "an unknown format": ({"format": "sparse"}, "format"),
    "a part larger than the batch": (
        {"micro_batch_size": 9},
        "micro_batch_size=9 is above batch_size=8",
    ),
    "layers run again one by one": (
        LAYER_WISE | {"gradient_checkpointing": True},
        "are for objective: end_to_end",
    ),
    "parts one by one": (LAYER_WISE | {"micro_batch_size": 2}, "one layer at a time"),
    "an unknown objective": ({"objective": "blocks"}, "'end_to_end' or 'layer_wise'"),
    "an unknown method": ({"method": "magic"}, "'learned', 'search' or 'identity'"),
    "an unknown score": ({"score": "taste"}, "score"),
    "an unknown space": ({"spaces": ["query"]}, "spaces"),
    "no spaces": ({"spaces": []}, "spaces"),
    "no targets": ({"targets": []}, "targets"),
    "more than all steps": ({"order_share": 1.5}, "order_share"),
    "no swaps": ({"swaps": 0}, "swaps"),
    "no steps": ({"steps": 0}, "steps"),
    "a temperature of 0": ({"temperature_end": 0}, "temperature_end"),
    "a negative weight": ({"hidden_weight": -1}, "hidden_weight"),
    "all rows held back": ({"validation": 1}, "validation"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_fields_that_make_no_sense_are_refused(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Modifier(**fields)
