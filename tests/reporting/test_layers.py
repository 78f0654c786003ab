# SPDX-License-Identifier: Apache-2.0
"""Figures of linears are put together by stack, layer and kind."""

import pytest

from nm_permute_plugin.reporting.layers import stacks
from nm_permute_plugin.reporting.run import Linear


def linear(name: str, after: float = 0.5, **fields: object) -> Linear:
    given = {"weights": 10, "score": 2.0, "before": 0.5, "exchanged": 0.0}
    return Linear(name=name, after=after, **given | fields)


def test_stacks_layers_and_kinds_are_told_apart() -> None:
    found = stacks(
        [
            linear("visual.blocks.0.attn.proj"),
            linear("model.layers.0.self_attn.output.dense"),
            linear("model.layers.0.mlp.output.dense"),
            linear("model.layers.10.mlp.output.dense"),
            linear("score"),
        ]
    )
    assert [stack.name for stack in found] == ["visual.blocks", "model.layers", ""]
    assert found[1].kinds == ("self_attn.output.dense", "mlp.output.dense")
    assert found[1].layers == (0, 10)
    assert set(found[1].cells) == {
        ("self_attn.output.dense", 0),
        ("mlp.output.dense", 0),
        ("mlp.output.dense", 10),
    }
    assert found[2].kinds == ("score",)


def test_experts_of_a_layer_are_one_cell_weighted_by_their_scores() -> None:
    first = linear("m.layers.3.mlp.experts.0.up", 0.9, score=3.0, exchanged=0.2)
    second = linear("m.layers.3.mlp.experts.1.up", 0.5, score=1.0, weights=30)
    (stack,) = stacks([first, second])
    ((place, cell),) = stack.cells.items()
    assert place == ("up", 3)
    assert cell.after == pytest.approx((3 * 0.9 + 0.5) / 4)
    assert cell.exchanged == pytest.approx(0.2 * 10 / 40)
    assert cell.cost_before is None


def test_costs_are_summed_where_all_are_known() -> None:
    costs = {"cost_before": 2.0, "cost_after": 1.0}
    known = [linear(f"m.layers.0.{kind}", **costs) for kind in "ab"]
    (stack,) = stacks(known)
    assert stack.by_layer[0].cost_before == 4.0
    assert stack.by_layer[0].cost_after == 2.0
    (stack,) = stacks([*known, linear("m.layers.0.c")])
    assert stack.by_layer[0].cost_before is None


def test_scores_of_zero_lose_nothing() -> None:
    (stack,) = stacks([linear("m.layers.0.a", 1.0, score=0.0)])
    assert stack.by_kind["a"].after == 1.0
