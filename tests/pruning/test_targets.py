# SPDX-License-Identifier: Apache-2.0
"""The targets of a recipe mean the linears of a model, whichever way it stores them."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedModel

from nm_permute_plugin.pruning.targets import match_linears, transposed_of

DEFAULT_IGNORE = ["lm_head"]
SIZES = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
CONV1D = [
    f"h.{i}.{name}"
    for i in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


@pytest.fixture
def bare() -> PreTrainedModel:
    """A GPT-2 that has Conv1D, and no Linear at all."""
    return GPT2Model(GPT2Config(**SIZES))


def test_linear_means_conv1d_too(bare: PreTrainedModel) -> None:
    assert sorted(match_linears(bare, ["Linear"], DEFAULT_IGNORE)) == sorted(CONV1D)
    whole = GPT2LMHeadModel(GPT2Config(**SIZES))
    found = match_linears(whole, ["Linear"], DEFAULT_IGNORE)
    assert sorted(found) == sorted(f"transformer.{name}" for name in CONV1D)
    assert len(match_linears(whole, ["Linear"], [])) == len(CONV1D) + 1


def test_patterns_choose_among_conv1d(bare: PreTrainedModel) -> None:
    found = match_linears(bare, ["re:.*c_fc$"], DEFAULT_IGNORE)
    assert found == ["h.0.mlp.c_fc", "h.1.mlp.c_fc"]
    assert transposed_of(bare, found) == found
    rest = match_linears(bare, ["Linear"], ["re:.*attn.*"])
    assert sorted(rest) == sorted(name for name in CONV1D if ".mlp." in name)


def test_what_has_no_matrix_is_no_target(bare: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"target h\.0\.ln_1 is a LayerNorm; only Lin"):
        match_linears(bare, ["re:.*ln_1$"], DEFAULT_IGNORE)
    with pytest.raises(ValueError, match="takes away all"):
        match_linears(bare, ["Linear"], ["re:.*"])
