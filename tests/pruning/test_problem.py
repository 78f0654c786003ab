# SPDX-License-Identifier: Apache-2.0
"""The scores of a space stand one below the other; masks come apart again."""

import pytest
import torch
from torch import Tensor, nn

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import expand_heads
from nm_permute_plugin.pruning.data import split_text
from nm_permute_plugin.pruning.problem import (
    Problem,
    Solution,
    SpaceScores,
    permuted_mask,
)
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.fold import fold
from nm_permute_plugin.specs.spec import Consumer

TWO_OF_FOUR = NMPattern(2, 4)


@pytest.fixture
def scores(tiny_model) -> dict[str, Tensor]:
    """The magnitude of every linear of a model with shared key/value heads."""
    linears = linears_of(tiny_model("llama"))
    return {name: module.weight.detach().abs() for name, module in linears.items()}


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("name", ["residual", "hidden.1", "value.0"])
def test_the_scores_come_apart_as_they_were(
    tiny_model, resolve_model, scores: dict[str, Tensor], name: str
) -> None:
    space = resolve_model(tiny_model("llama")).spaces[name]
    of_space = SpaceScores.of(space, scores)
    assert of_space.score.shape[1] == space.size
    parts = of_space.parts()
    assert [consumer for consumer, _ in parts] == list(space.consumers)
    for consumer, part in parts:
        assert torch.equal(consumer.unview(part), scores[consumer.name])


def test_the_scores_of_the_residual_space_hold_every_row(
    tiny_model, resolve_model, scores: dict[str, Tensor]
) -> None:
    space = resolve_model(tiny_model("llama")).spaces["residual"]
    of_space = SpaceScores.of(space, scores)
    expected = torch.cat([scores[consumer.name] for consumer in space.consumers])
    assert torch.equal(of_space.score, expected)
    assert sum(of_space.rows) == len(expected)


@pytest.mark.parametrize("name", ["residual", "value.0"])
def test_sensitivities_stand_where_their_rows_stand(
    tiny_model, resolve_model, scores: dict[str, Tensor], name: str
) -> None:
    sensitivity = {n: torch.arange(1.0, 1 + len(score)) for n, score in scores.items()}
    space = resolve_model(tiny_model("llama")).spaces[name]
    of_space = SpaceScores.of(space, scores, sensitivity)
    weighted = {n: score * sensitivity[n][:, None] for n, score in scores.items()}
    expected = SpaceScores.of(space, weighted).score
    assert of_space.sensitivity is not None
    assert torch.equal(of_space.score * of_space.sensitivity[:, None], expected)


def test_channels_as_they_are_have_the_plain_masks(
    tiny_model, resolve_model, scores: dict[str, Tensor]
) -> None:
    for space in resolve_model(tiny_model("llama")).spaces.values():
        masks = SpaceScores.of(space, scores).masks(
            torch.arange(space.size), TWO_OF_FOUR, Solution()
        )
        for name, mask in masks.items():
            assert torch.equal(mask, nm_mask(scores[name], TWO_OF_FOUR))
            assert mask.dtype == torch.bool


def test_masks_of_a_permutation_are_those_of_the_folded_model(
    tiny_model, resolve_model, legal_perms, scores: dict[str, Tensor]
) -> None:
    model = tiny_model("llama")
    resolved = resolve_model(model)
    perms = legal_perms(resolved)
    fold(model, resolved, perms)
    for name in ("hidden.0", "value.1", "residual"):
        space, perm = resolved.spaces[name], perms[name]
        for linear, mask in (
            SpaceScores.of(space, scores).masks(perm, TWO_OF_FOUR, Solution()).items()
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


@pytest.mark.parametrize("queries", [1, 2])
def test_each_group_of_rows_has_its_own_multipliers(queries: int) -> None:
    generator = torch.Generator().manual_seed(queries)
    consumer = Consumer("o", queries=queries, head_dim=8)
    score = torch.rand(12, 8 * queries, generator=generator)
    factors = torch.rand(3, 8 * queries, generator=generator)
    perm = torch.randperm(8, generator=generator)
    mask = consumer.unview(
        permuted_mask(consumer, consumer.view(score), perm, TWO_OF_FOUR, factors)
    )
    scaled = score * factors.repeat_interleave(4, 0)
    expected = permuted_mask(consumer, consumer.view(scaled), perm, TWO_OF_FOUR)
    assert torch.equal(mask, consumer.unview(expected))


@pytest.mark.parametrize("name", ["residual", "value.1"])
def test_some_consumers_alone_have_the_masks_they_have_among_all(
    tiny_model, resolve_model, legal_perms, scores: dict[str, Tensor], name: str
) -> None:
    resolved = resolve_model(tiny_model("llama"))
    of_space = SpaceScores.of(resolved.spaces[name], scores)
    perm = legal_perms(resolved)[name]
    masks = of_space.masks(perm, TWO_OF_FOUR, Solution())
    layer = "model.layers.1."
    inside = {n for n in masks if n.startswith(layer)}
    part = of_space.only(inside)
    assert part is not None
    alone = part.masks(perm, TWO_OF_FOUR, Solution())
    assert set(alone) == inside
    assert [n for n in inside if not torch.equal(alone[n], masks[n])] == []
    assert of_space.only(masks) is of_space
    assert of_space.only(["another"]) is None


@pytest.fixture
def prepare(tiny_model, resolve_model, chain_rows):
    """A factory: a tiny model as a problem."""

    def make(**changes: object) -> Problem:
        model = tiny_model("llama")
        resolved = resolve_model(model)
        data = split_text(list(chain_rows(10, 32, seed=1)), 4, 0.2, seed=0)
        names = [n for n in linears_of(model) if n != "lm_head"]
        settings = Settings.model_validate(changes)
        return Problem.prepare(model, resolved, names, data, settings)

    return make


def test_a_problem_of_some_linears_alone(prepare) -> None:
    problem = prepare(spaces=("hidden", "residual"))
    assert problem.only(problem.linears) is problem
    names = {n for n in problem.linears if "layers.0.mlp" not in n}
    names -= {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"}
    part, start = problem.only(names), problem.complete(Solution())
    assert set(part.linears) == names
    assert set(part.spaces) == {"hidden.1", "residual"}
    assert part.known != problem.known
    ours, all_masks = part.masks(start), problem.masks(start)
    assert set(ours) == names
    assert [n for n in names if not torch.equal(ours[n], all_masks[n])] == []

    def sensitivities(of: SpaceScores) -> dict[str, torch.Tensor]:
        assert of.sensitivity is not None
        pieces = of.sensitivity.split(list(of.rows))
        return {c.name: p for (c, _), p in zip(of.parts(), pieces, strict=True)}

    whole = sensitivities(problem.spaces["residual"])
    for name, piece in sensitivities(part.spaces["residual"]).items():
        assert torch.equal(piece, whole[name])


def test_spaces_that_stay_leave_their_consumers_fixed(prepare) -> None:
    problem = prepare(spaces="hidden")
    assert set(problem.spaces) == {"hidden.0", "hidden.1"}
    assert len(problem.fixed) == 12
    assert len(problem.linears) == len(set(problem.linears)) == 14
    assert set(problem.masks(Solution())) == set(problem.linears)


def test_without_a_permutation_masks_are_those_of_the_plain_score(prepare) -> None:
    fixed = prepare(method="identity")
    assert fixed.spaces == {}
    plain = {n: nm_mask(score, TWO_OF_FOUR) for n, score in fixed.fixed.items()}
    for problem in (fixed, prepare()):
        masks = problem.masks(Solution())
        assert set(masks) == set(plain)
        assert [n for n in plain if not torch.equal(masks[n], plain[n])] == []


def test_masks_of_everything_lose_nothing(prepare) -> None:
    problem = prepare(score="magnitude")
    everything = {n: torch.ones_like(m) for n, m in problem.masks(Solution()).items()}
    nothing_lost = problem.teacher.validate(everything, problem.data.validation)
    assert abs(nothing_lost) < 1e-6 < problem.validate(Solution())


def test_layer_wise_keeps_scores_unweighted(prepare) -> None:
    for of in prepare(objective="layer_wise").spaces.values():
        assert of.sensitivity is None
    for of in prepare().spaces.values():
        assert of.sensitivity is not None
        assert bool((of.sensitivity > 0).all())
