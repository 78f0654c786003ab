# SPDX-License-Identifier: Apache-2.0
"""What cannot be pruned is refused, and every weight stays as it was."""

from contextlib import nullcontext
from typing import get_args

import pytest
import torch
from torch import Tensor
from whole_runs import assert_same, linears, weights_of

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.scores import ScoreName
from nm_permute_plugin.pruning.folding import refuse_inexact
from nm_permute_plugin.pruning.settings import Method
from nm_permute_plugin.pruning.targets import refuse_sparse
from nm_permute_plugin.specs.architectures import LLAMA, head_dim_of
from nm_permute_plugin.specs.spec import resolve

METHODS = get_args(Method)
SCORES = get_args(ScoreName)


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
        go(model, method=method, score=score)
    after = {n: tensor.nan_to_num() for n, tensor in weights_of(model).items()}
    assert_same(after, before)


@pytest.mark.parametrize("score", SCORES)
def test_weights_that_are_not_finite_are_refused(tiny_model, go, score: str) -> None:
    model = tiny_model("llama")
    poison(model.model.layers[0].mlp.up_proj.weight, float("inf"))
    with pytest.raises(ValueError, match="finite"):
        go(model, score=score)


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
        go(model, method=method, options={"resolved": wrong})
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
