# SPDX-License-Identifier: Apache-2.0
"""Readers of a space stand one below the other and come apart again."""

import pytest
import torch
from torch import Tensor

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import expand_heads
from nm_permute_plugin.pruning.stacking import StackedScore, mask_in_order
from nm_permute_plugin.specs.fold import fold
from nm_permute_plugin.specs.spec import Consumer, Space

TWO_OF_FOUR = NMPattern(2, 4)


@pytest.fixture
def scores(tiny_model) -> dict[str, Tensor]:
    """The magnitude of every linear of a model with shared key/value heads."""
    linears = torch.nn.Linear
    named = tiny_model("llama").named_modules()
    return {n: m.weight.detach().abs() for n, m in named if isinstance(m, linears)}


@pytest.mark.parametrize("name", ["residual", "hidden.1", "value.0"])
def test_a_stack_comes_apart_as_it_was(
    tiny_model, resolve_model, scores: dict[str, Tensor], name: str
) -> None:
    space = resolve_model(tiny_model("llama")).spaces[name]
    stacked = StackedScore.of(space, scores)
    assert stacked.score.shape[1] == space.size
    parts = stacked.split(stacked.score)
    assert set(parts) == {consumer.name for consumer in space.consumers}
    assert [n for n, part in parts.items() if not torch.equal(part, scores[n])] == []


def test_the_stack_of_the_residual_space_holds_every_row(
    tiny_model, resolve_model, scores: dict[str, Tensor]
) -> None:
    space = resolve_model(tiny_model("llama")).spaces["residual"]
    stacked = StackedScore.of(space, scores)
    expected = torch.cat([scores[consumer.name] for consumer in space.consumers])
    assert torch.equal(stacked.score, expected)
    assert sum(stacked.rows) == len(expected)


@pytest.mark.parametrize("name", ["residual", "value.0"])
def test_weights_of_rows_stand_where_their_rows_stand(
    tiny_model, resolve_model, scores: dict[str, Tensor], name: str
) -> None:
    weights = {n: torch.arange(1.0, 1 + len(score)) for n, score in scores.items()}
    space = resolve_model(tiny_model("llama")).spaces[name]
    stacked = StackedScore.of(space, scores, weights)
    weighted = {n: score * weights[n][:, None] for n, score in scores.items()}
    expected = StackedScore.of(space, weighted).score
    assert stacked.weights is not None
    assert torch.equal(stacked.score * stacked.weights[:, None], expected)


def test_the_order_as_it_is_gives_the_plain_masks(
    tiny_model, resolve_model, scores: dict[str, Tensor]
) -> None:
    for space in resolve_model(tiny_model("llama")).spaces.values():
        masks = StackedScore.of(space, scores).masks(
            torch.arange(space.size), TWO_OF_FOUR
        )
        for name, mask in masks.items():
            assert torch.equal(mask, nm_mask(scores[name], TWO_OF_FOUR))
            assert mask.dtype == torch.bool


def test_masks_of_an_order_are_those_of_the_folded_model(
    tiny_model, resolve_model, legal_perms, scores: dict[str, Tensor]
) -> None:
    model = tiny_model("llama")
    resolved = resolve_model(model)
    perms = legal_perms(resolved)
    fold(model, resolved, perms)
    for name in ("hidden.0", "value.1", "residual"):
        space, perm = resolved.spaces[name], perms[name]
        for linear, mask in (
            StackedScore.of(space, scores).masks(perm, TWO_OF_FOUR).items()
        ):
            weight = model.get_submodule(linear).weight.detach()
            folded = nm_mask(weight.abs(), TWO_OF_FOUR)
            columns = expand_heads(perm, 8, 2) if space.family == "value" else perm
            # The mask stands in the old places: move its columns, then its rows.
            moved = mask[:, columns]
            [(rows, _)] = next(
                p.matrices for p in resolved.parameters if f"{linear}.weight" in p.names
            )
            if rows[0].space is not None:
                moved = moved[perms[rows[0].space]]
            assert torch.equal(moved, folded), linear


@pytest.mark.parametrize(
    ("most", "sections"),
    [(None, (1, 2)), (16, (2, 2)), (5, (6, 8)), (1, (24, 32))],
)
def test_sections_are_as_long_as_may_be_and_stay_inside_a_query_head(
    most: int | None, sections: tuple[int, ...]
) -> None:
    space = Space(
        "value.0", 8, 8, (Consumer("a"), Consumer("b", queries=2, head_dim=8))
    )
    scores = {"a": torch.rand(24, 8), "b": torch.rand(16, 16)}
    assert StackedScore.of(space, scores).sections(most) == sections


@pytest.mark.parametrize("queries", [1, 2])
def test_each_run_of_rows_is_judged_by_its_own_multipliers(queries: int) -> None:
    generator = torch.Generator().manual_seed(queries)
    consumer = Consumer("o", queries=queries, head_dim=8)
    score = torch.rand(12, 8 * queries, generator=generator)
    factors = torch.rand(3, 8 * queries, generator=generator)
    order = torch.randperm(8, generator=generator)
    mask = consumer.unview(
        mask_in_order(consumer, consumer.view(score), order, TWO_OF_FOUR, factors)
    )
    scaled = score * factors.repeat_interleave(4, 0)
    expected = mask_in_order(consumer, consumer.view(scaled), order, TWO_OF_FOUR)
    assert torch.equal(mask, consumer.unview(expected))
