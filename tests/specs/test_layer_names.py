# SPDX-License-Identifier: Apache-2.0
"""Names of layers alike come in one text, and none is lost."""

import pytest

from nm_permute_plugin.specs.layer_names import counted, merged


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], []),
        (["model.layers.0.q"], ["model.layers.0.q"]),
        (["layers.10.fc2", "layers.2.fc2"], ["layers.{2,10}.fc2"]),
        # of two numbers the last: a line a layer for its experts
        (
            ["l.0.experts.0.up", "l.0.experts.1.up", "l.1.experts.0.up"],
            ["l.0.experts.{0-1}.up", "l.1.experts.0.up"],
        ),
        # other texts, and numbers that disagree inside a text, stay as they are
        (["a.0 (48) reads b.0", "a.1 (32) reads b.1"],) * 2,
        (["a.0 reads b.1", "a.1 reads b.2"],) * 2,
        (["48 of a", "32 of a"],) * 2,
    ],
)
def test_texts_that_differ_in_one_number_are_one(
    texts: list[str], expected: list[str]
) -> None:
    assert merged(texts) == expected


def test_every_number_of_a_run_with_gaps_is_told() -> None:
    texts = [f"hidden.{n} reads layers.{n}.down" for n in (0, 1, 2, 4, 6, 7)]
    assert merged(texts) == ["hidden.{0-2,4,6-7} reads layers.{0-2,4,6-7}.down"]


def test_names_alike_but_for_their_numbers_are_counted_in_order() -> None:
    names = ["b.w", "a.0.experts.1.w", "a.10.experts.0.w", "a.0", "a.1 (output)", "a.2"]
    assert list(counted(names).items()) == [
        ("b.w", 1),
        ("a.{i}.experts.{i}.w", 2),
        ("a.{i}", 2),
        ("a.{i} (output)", 1),
    ]
    assert list(counted(names[1:2], "*")) == ["a.*.experts.*.w"]
