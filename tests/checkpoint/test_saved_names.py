# SPDX-License-Identifier: Apache-2.0
"""Modules are found under the names that a save gives them, or refused clearly."""

import pytest
from torch import nn
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from nm_permute_plugin.checkpoint.saved_names import saved_names

Q, K = (f"model.layers.0.self_attn.{part}_proj" for part in "qk")


def test_names_are_those_of_the_model_where_nothing_is_renamed(tiny_model) -> None:
    assert saved_names(tiny_model("llama"), [K, Q]) == [K, Q]


def test_an_older_name_is_found(tiny_model) -> None:
    model = tiny_model("llama")
    model._weight_conversions = [WeightRenaming("attention", "self_attn")]
    assert saved_names(model, [Q]) == [Q.replace("self_attn", "attention")]


MERGED = WeightConverter(
    source_patterns="self_attn.qk.weight",
    target_patterns=["self_attn.q_proj.weight", "self_attn.k_proj.weight"],
    operations=[Chunk(dim=0)],
)
SPLIT = WeightConverter(
    source_patterns=["self_attn.q0.weight", "self_attn.q1.weight"],
    target_patterns="self_attn.q_proj.weight",
    operations=[Concatenate(dim=0)],
)
TURNED = WeightConverter(
    source_patterns="self_attn.q.weight",
    target_patterns="self_attn.q_proj.weight",
    operations=[Transpose(0, 0)],
)


@pytest.mark.parametrize(
    "conversion", [MERGED, SPLIT, TURNED], ids=["merged", "split", "copied"]
)
def test_a_weight_that_is_another_one_on_disk_is_refused(
    tiny_model, conversion: WeightConverter
) -> None:
    model = tiny_model("llama")
    assert isinstance(model, nn.Module)
    model._weight_conversions = [conversion]
    with pytest.raises(
        ValueError, match=r"transformers merges, splits or copies .*Llama"
    ):
        saved_names(model, [Q, K])
