# SPDX-License-Identifier: Apache-2.0
"""What settings leave alone is said with its reason."""

import pytest

from nm_permute_plugin.pruning.describe import changed_settings, stays_dense
from nm_permute_plugin.pruning.run import PrunePlan
from nm_permute_plugin.pruning.settings import Settings


@pytest.mark.parametrize(
    ("fields", "lines"),
    [
        ({}, ["lm_head stays dense: `ignore` names lm_head"]),
        (
            {"ignore": ["lm_head", "re:.*o_proj"]},
            [
                "model.layers.{0-1}.self_attn.o_proj stays dense: `ignore` names "
                "re:.*o_proj",
                "lm_head stays dense: `ignore` names lm_head",
            ],
        ),
        (
            {"targets": ["re:.*(?<!down)_proj"]},
            [
                "model.layers.{0-1}.mlp.down_proj stays dense: no target names it",
                "lm_head stays dense: `ignore` names lm_head",
            ],
        ),
    ],
    ids=["default", "ignored", "no-target"],
)
def test_every_dense_linear_has_its_reason(tiny_model, fields, lines) -> None:
    model, settings = tiny_model("llama"), Settings.model_validate(fields)
    plan = PrunePlan.of(model, settings)
    assert stays_dense(model, plan.prunable, settings) == lines
    assert set(lines) <= set(plan.lines(settings))


def test_only_what_differs_is_named() -> None:
    assert changed_settings(Settings()) == {}
    given = Settings(learn={"steps": 3}, recover=["blocks"], ignore=["head"])
    assert changed_settings(given) == {
        "ignore": ["head"],
        "learn.steps": 3,
        "recover.stages": ["blocks"],
    }
