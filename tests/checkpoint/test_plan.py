# SPDX-License-Identifier: Apache-2.0
"""The format fits the checkpoint, and what is known of its matrices is not read again."""

import pytest
from checkpoint_files import MakeDense

from nm_permute_plugin.checkpoint.directory import open_checkpoint
from nm_permute_plugin.checkpoint.pattern import check_pattern
from nm_permute_plugin.checkpoint.plan import TWO_FOUR, choose_format, make_plan
from nm_permute_plugin.maths.pattern import NMPattern

DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"
FOUR_EIGHT = NMPattern(4, 8)


@pytest.mark.parametrize(
    ("asked", "pattern", "kind", "expected"),
    [
        ("auto", TWO_FOUR, "bf16", "sparse-24-bitmask"),
        ("auto", TWO_FOUR, "fp8", "sparse-24-bitmask"),
        ("auto", TWO_FOUR, "int8", "sparse-24-bitmask"),
        ("auto", FOUR_EIGHT, "bf16", "dense"),
        ("dense", TWO_FOUR, "bf16", "dense"),
        ("sparse-bitmask", FOUR_EIGHT, "fp8", "sparse-bitmask"),
    ],
)
def test_the_format_fits(
    make_dense: MakeDense, asked: str, pattern: NMPattern, kind: str, expected: str
) -> None:
    checkpoint = open_checkpoint(make_dense(kind))
    assert choose_format(checkpoint, asked, pattern, [DOWN])[0] == expected


def test_nothing_pruned_is_stored_dense(make_dense: MakeDense) -> None:
    assert choose_format(open_checkpoint(make_dense()), "auto", TWO_FOUR, []) == (
        "dense",
        "nothing is pruned",
    )


EXPERT = "model.layers.0.mlp.experts.0.up_proj"


@pytest.mark.parametrize(
    ("asked", "kind", "pruned", "expected"),
    [
        ("auto", "bf16", [DOWN, EXPERT], ("sparse-24-bitmask", "the default for")),
        ("auto", "bf16", [EXPERT], ("sparse-24-bitmask", "the default for")),
        ("sparse-24-bitmask", "bf16", [EXPERT], ("sparse-24-bitmask", "asked for")),
        ("auto", "fp8", [DOWN, EXPERT], ("dense", "quantized and sparse")),
    ],
)
def test_experts_are_sparse_unless_they_are_quantized(
    make_dense: MakeDense, asked: str, kind: str, pruned: list[str], expected: tuple
) -> None:
    checkpoint = open_checkpoint(make_dense(kind))
    format, reason = choose_format(checkpoint, asked, TWO_FOUR, pruned)
    assert format == expected[0]
    assert expected[1] in reason


def test_modules_that_were_counted_are_planned_as_those_that_are_read(
    make_dense: MakeDense,
) -> None:
    checkpoint = open_checkpoint(make_dense())
    counted = check_pattern(checkpoint, [DOWN, UP], TWO_FOUR)
    asked = checkpoint, "sparse-24-bitmask", [UP]
    plan = make_plan(*asked, counted=counted)
    assert plan == make_plan(*asked)
    assert plan.nonzeros == {UP: counted[UP]}
    assert plan.dense[DOWN] == "not asked for"
