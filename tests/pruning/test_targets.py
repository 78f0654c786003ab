# SPDX-License-Identifier: Apache-2.0
"""The targets of a recipe mean the linears of a model, whichever way it stores them."""

import pytest
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedModel

from nm_permute_plugin.checkpoint.config import matches
from nm_permute_plugin.pruning.reading import read_samples
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


@pytest.mark.parametrize(
    ("entry", "remedy"),
    [
        ("attn.c_atn", "'re:.*attn.c_attn'"),
        ("c_fc", "'re:.*c_fc'"),
        ("mlp.c_fc", "'re:.*mlp.c_fc'"),
        ("re:.*c_fcc$", "'re:.*c_fc'"),
        ("h.0.mlp.c_fcc", "'h.0.mlp.c_fc'"),
        ("Conv1d", "'Conv1D'"),
        ("*.mlp.*", r"'re:.*\.mlp\..*'"),
    ],
)
@pytest.mark.parametrize("where", ["targets", "ignore"])
def test_what_matches_nothing_is_told_what_would(
    bare: PreTrainedModel, entry: str, remedy: str, where: str
) -> None:
    lists = {"targets": ["Linear"], "ignore": DEFAULT_IGNORE, where: [entry]}
    with pytest.raises(ValueError, match="matches no module") as refusal:
        match_linears(bare, **lists)
    said = str(refusal.value)
    assert said.startswith(f"`{where}`: {entry!r} ")
    assert said.endswith(f"did you mean {remedy}?")
    names = [(name, type(module).__name__) for name, module in bare.named_modules()]
    assert any(matches(remedy.strip("'"), *name) for name in names)


def test_what_resembles_nothing_is_told_what_names_look_like(
    bare: PreTrainedModel,
) -> None:
    with pytest.raises(ValueError, match=r"such as 'h\.0\.attn\.c_attn', a class"):
        match_linears(bare, ["xyz"], DEFAULT_IGNORE)


class StandInForLora(nn.Linear):
    """Stands in for ``peft.tuners.lora.Linear``: PEFT is not installed for the tests."""

    __module__ = "peft.tuners.lora.layer"


def test_a_model_with_adapters_is_told_to_merge_them(tiny_model, chain_rows) -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj = StandInForLora(32, 32, bias=False)
    said = r"adapters \(model\.layers\.1\.self_attn\.q_proj\).*merge_and_unload"
    with pytest.raises(ValueError, match=said):
        match_linears(model, ["Linear"], DEFAULT_IGNORE)
    with pytest.raises(ValueError, match=said):
        read_samples(model, [{"input_ids": chain_rows(12, 32, seed=1)}])
