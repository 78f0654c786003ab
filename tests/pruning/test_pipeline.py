# SPDX-License-Identifier: Apache-2.0
"""In memory: every method folds exactly, prunes N:M, repeats itself, or changes nothing."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import check_permutation
from nm_permute_plugin.maths.scores import ScoreName, score_weight
from nm_permute_plugin.pruning.learn.loop import LearnSettings
from nm_permute_plugin.pruning.learn.order_shape import OrderShape
from nm_permute_plugin.pruning.pipeline import (
    Method,
    OrderSettings,
    Record,
    permute_and_prune,
    refuse_inexact,
    refuse_sparse,
)
from nm_permute_plugin.pruning.running.loss import loss, run
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.stacking import StackedScore
from nm_permute_plugin.pruning.statistics import input_norms
from nm_permute_plugin.pruning.text import split_text
from nm_permute_plugin.specs.architectures import LLAMA, head_dim_of
from nm_permute_plugin.specs.fold import fold, invert_all
from nm_permute_plugin.specs.spec import resolve

METHODS = get_args(Method)
SCORES = get_args(ScoreName)
FAST = LearnSettings(steps=3, evaluate_every=1, shape=OrderShape(block_size=16))
SEARCH = OrderSettings(NMPattern(2, 4), method="search", learn=FAST)


def linears(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: tensor.detach().clone() for name, tensor in named}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    assert [n for n in first if not torch.equal(first[n], second[n])] == []


def logits_of(model: nn.Module, text: Samples) -> Tensor:
    with torch.no_grad():
        return model(**text.validation[0], use_cache=False).logits


@pytest.fixture
def text(chain_rows) -> Samples:
    return split_text(list(chain_rows(10, 32, seed=1)), 4, validation=0.2, seed=0)


@pytest.fixture
def go(resolve_model, text):
    """A factory: ``go(model, settings)`` is the record of a whole run."""

    def run(model: nn.Module, settings: OrderSettings = SEARCH, **options) -> Record:
        resolved = options.pop("resolved", None) or resolve_model(model)
        arguments = {"prunable": linears(model), "samples": text} | options
        return permute_and_prune(model, resolved, settings=settings, **arguments)

    return run


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_score_leaves_exactly_two_of_four(
    tiny_model, go, assert_exactly, method: str, score: str
) -> None:
    model = tiny_model("llama")
    go(model, replace(SEARCH, method=method, score=score))
    assert_exactly(model)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_architecture_runs(
    tiny_model, go, assert_exactly, architecture: str, tied: bool
) -> None:
    model = tiny_model(architecture, tie_word_embeddings=tied)
    record = go(model)
    assert_exactly(model)
    best = min(record.history, key=lambda look: look["validation"])
    assert (record.fold_error > 0) == (best["round"] > 0)
    assert record.fold_error < 1e-5


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "3:4"])
def test_other_patterns_run(tiny_model, go, assert_exactly, pattern: str) -> None:
    model = tiny_model("llama")
    go(model, replace(SEARCH, pattern=NMPattern.parse(pattern)))
    assert_exactly(model, pattern)


# bfloat16 measured 0 here: sums run in float32 and round to the same 8 bits.
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
    ids=["fp64", "fp32", "bf16"],
)
def test_the_exactness_of_the_fold_is_on_record(
    tiny_model, go, dtype: torch.dtype, bound: float
) -> None:
    record = go(tiny_model("llama", dtype=dtype))
    assert dtype == torch.bfloat16 or record.fold_error > 0
    assert record.fold_error < bound


@pytest.mark.parametrize("method", ["search", "learned"])
def test_orders_on_record_are_legal_permutations(
    tiny_model, go, resolve_model, method: str
) -> None:
    model = tiny_model("llama")
    spaces = resolve_model(model).spaces
    record = go(model, replace(SEARCH, method=method))
    assert set(record.perms) == set(spaces)
    for name, perm in record.perms.items():
        check_permutation(perm)
        segment = spaces[name].segment
        assert torch.equal(perm // segment, torch.arange(spaces[name].size) // segment)


def test_identity_orders_nothing_and_prunes_by_the_plain_score(
    tiny_model, go, text: Samples
) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    record = go(model, replace(SEARCH, method="identity"))
    assert record.perms == {}
    assert record.fold_error == 0
    assert record.history == []
    assert record.retained[0] == record.retained[1]
    for name, norm in input_norms(dense, linears(dense), text.train).items():
        weight = dense.get_submodule(name).weight.detach()
        keep = nm_mask(score_weight("wanda", weight, norm), NMPattern(2, 4))
        expected = weight.masked_fill(~keep, 0)
        assert torch.equal(model.get_submodule(name).weight, expected)


def test_the_retained_score_on_record_is_that_of_the_pruned_weights(
    tiny_model, go
) -> None:
    model = tiny_model("llama")
    total = sum(
        float(model.get_submodule(n).weight.abs().sum()) for n in linears(model)
    )
    record = go(model, replace(SEARCH, score="magnitude"))
    kept = sum(float(model.get_submodule(n).weight.abs().sum()) for n in linears(model))
    assert record.retained[0] < record.retained[1]
    assert record.retained[1] == pytest.approx(kept / total, rel=1e-5)


@pytest.mark.parametrize("method", ["search", "learned"])
def test_without_pruning_the_function_stays_and_unfolds_bitwise(
    tiny_model, go, resolve_model, text: Samples, method: str
) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    before = weights_of(dense)
    record = go(model, replace(SEARCH, method=method, prune=False))
    torch.testing.assert_close(
        logits_of(model, text), logits_of(dense, text), atol=1e-5, rtol=1e-5
    )
    after = weights_of(model)
    moved = [name for name in before if not torch.equal(after[name], before[name])]
    assert moved == list(before)
    assert "prune" not in record.seconds
    fold(model, resolve_model(model), invert_all(record.perms))
    assert_same(weights_of(model), before)


@pytest.mark.parametrize("method", ["search", "learned"])
def test_what_is_pruned_are_the_masks_of_the_dense_model_in_its_old_places(
    tiny_model, go, resolve_model, text: Samples, method: str
) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    resolved, names = resolve_model(model), linears(model)
    record = go(model, replace(SEARCH, method=method))
    fold(model, resolved, invert_all(record.perms))
    norms = input_norms(dense, names, text.train)
    scores = {
        name: score_weight("wanda", dense.get_submodule(name).weight.detach(), norm)
        for name, norm in norms.items()
    }
    for space in resolved.spaces.values():
        stack = StackedScore.of(space, scores)
        masks = stack.masks(record.perms[space.name], NMPattern(2, 4))
        for name, mask in masks.items():
            expected = dense.get_submodule(name).weight.masked_fill(~mask, 0)
            assert torch.equal(model.get_submodule(name).weight, expected)


def test_the_pruned_model_is_the_one_that_the_validation_text_liked_best(
    tiny_model, go, text: Samples
) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    learn = replace(
        FAST,
        steps=12,
        multiplier_rate=0.1,
        shape=OrderShape(block_size=16, multipliers=True),
    )
    record = go(model, replace(SEARCH, method="learned", learn=learn))
    losses = []
    with torch.no_grad():
        for batch in text.validation:
            answers = run(model, batch, learn.loss), run(dense, batch, learn.loss)
            losses.append(float(loss(*answers, batch, learn.loss)))
    best = min(look["validation"] for look in record.history)
    assert best < record.history[0]["validation"]
    assert sum(losses) / len(losses) == pytest.approx(best, rel=1e-4)


def test_learning_starts_from_the_search_and_never_ends_behind_it(
    tiny_model, go
) -> None:
    record = go(tiny_model("llama"), replace(SEARCH, method="learned"))
    assert [look["step"] for look in record.history] == [0, 1, 2, 3]
    assert min(look["validation"] for look in record.history) > 0
    zero = replace(
        FAST,
        steps=1,
        learning_rate=1e-9,
        shape=replace(FAST.shape, relaxation="straight_through"),
    )
    still = go(tiny_model("llama"), replace(SEARCH, method="learned", learn=zero))
    assert_same(still.perms, go(tiny_model("llama")).perms)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_weights(tiny_model, go, method: str) -> None:
    settings = replace(SEARCH, method=method)
    first, again = tiny_model("llama"), tiny_model("llama")
    records = [go(model, settings) for model in (first, again)]
    assert_same(weights_of(first), weights_of(again))
    assert_same(records[0].perms, records[1].perms)
    assert records[0].history == records[1].history
    assert records[0].retained == records[1].retained


def test_another_seed_gives_other_weights(tiny_model, go) -> None:
    first, other = tiny_model("llama"), tiny_model("llama")
    go(first)
    go(other, replace(SEARCH, learn=replace(FAST, seed=1)))
    weights = weights_of(first), weights_of(other)
    assert [n for n in weights[0] if not torch.equal(weights[0][n], weights[1][n])]


@pytest.mark.parametrize("family", ["residual", "hidden", "value"])
@pytest.mark.parametrize("method", ["search", "learned"])
def test_one_family_is_ordered_and_all_linears_are_pruned(
    tiny_model, go, assert_exactly, family: str, method: str
) -> None:
    model = tiny_model("llama")
    record = go(model, replace(SEARCH, families=(family,), method=method))
    assert {name.split(".")[0] for name in record.perms} == {family}
    assert_exactly(model)


def test_stages_are_timed(tiny_model, go) -> None:
    record = go(tiny_model("llama"), replace(SEARCH, method="learned"))
    stages = ["statistics", "search", "learn", "fold", "prune"]
    assert list(record.seconds) == stages
    assert min(record.seconds.values()) >= 0


def test_a_sparse_model_is_refused_and_untouched(tiny_model, go) -> None:
    model = tiny_model("llama")
    down = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        down[:, ::2] = 0
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"1\.mlp\.down_proj is sparse already: 50%"):
        go(model)
    assert_same(weights_of(model), before)


def test_sparse_means_as_many_zeros_as_the_pattern_asks_for(tiny_model) -> None:
    model = tiny_model("llama")
    name = "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[:, ::4] = 0
    refuse_sparse(model, [name], NMPattern(2, 4))
    with pytest.raises(ValueError, match="25% of its weights"):
        refuse_sparse(model, [name], NMPattern(3, 4))


def poison(tensor: Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.view(-1)[3] = value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("score", SCORES)
def test_activations_that_are_not_finite_are_blamed_and_change_nothing(
    tiny_model, go, method: str, score: str
) -> None:
    model = tiny_model("llama")
    poison(model.model.layers[0].post_attention_layernorm.weight, float("nan"))
    before = {n: tensor.nan_to_num() for n, tensor in weights_of(model).items()}
    # Not a RuntimeError that blames the permutation spec.
    with pytest.raises(ValueError, match="nan|finite"):
        go(model, replace(SEARCH, method=method, score=score))
    after = {n: tensor.nan_to_num() for n, tensor in weights_of(model).items()}
    assert_same(after, before)


@pytest.mark.parametrize("score", SCORES)
def test_weights_that_are_not_finite_are_refused(tiny_model, go, score: str) -> None:
    model = tiny_model("llama")
    poison(model.model.layers[0].mlp.up_proj.weight, float("inf"))
    with pytest.raises(ValueError, match="finite"):
        go(model, replace(SEARCH, score=score))


@pytest.mark.parametrize("method", ["search", "learned"])
def test_a_wrong_spec_is_undone_bitwise(
    tiny_model, go, resolve_model, method: str
) -> None:
    model = tiny_model("llama")
    spec = {**LLAMA, "model.norm.weight": "_"}
    wrong = resolve(
        model, spec, NMPattern(2, 4), linears(model), head_dim_of(model.config)
    )
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="The weights are as they were"):
        go(model, replace(SEARCH, method=method), resolved=wrong)
    assert_same(weights_of(model), before)


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_a_spec_that_is_tried_leaves_every_bit(tiny_model, tokens, wrong: bool) -> None:
    model = tiny_model("llama")
    spec = {**LLAMA, "model.norm.weight": "_"} if wrong else LLAMA
    tried = resolve(
        model, spec, NMPattern(2, 4), linears(model), head_dim_of(model.config)
    )
    before = weights_of(model)
    refusal = (
        pytest.raises(RuntimeError, match="does not fit this model")
        if wrong
        else nullcontext()
    )
    with refusal:
        refuse_inexact(model, tried, {"input_ids": tokens})
    assert_same(weights_of(model), before)


OFFLOADED = {
    "search": {"method": "search"},
    "learned": {"method": "learned"},
    "layer-wise": {"method": "learned", "objective": "layer_wise"},
}


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("changes", OFFLOADED.values(), ids=OFFLOADED)
def test_an_offloaded_model_gets_the_same_weights(
    tiny_model,
    go,
    resolve_model,
    offload_to,
    tmp_path: Path,
    place: str,
    changes: dict[str, str],
) -> None:
    offload = pytest.importorskip("compressed_tensors.offload")
    settings = replace(SEARCH, **changes)
    here, away = tiny_model("llama"), tiny_model("llama")
    go(here, settings)
    offload_to(away, place, tmp_path)
    with offload.disable_onloading():
        resolved = resolve_model(away)
    write = offload.update_offload_parameter
    go(away, settings, resolved=resolved, write=write, hold=offload.disable_offloading)
    assert_same(weights_of(away), weights_of(here))
