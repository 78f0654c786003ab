# SPDX-License-Identifier: Apache-2.0
"""Settings that nothing would read, or that make no sense, are refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from nm_permute_plugin.modifiers import LearnablePermutationModifier


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
