# SPDX-License-Identifier: Apache-2.0
"""The spec resolves and describes every architecture and option right."""

import re

import pytest
import torch
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)
from zoo import TEXT

from nm_permute_plugin.specs.architectures import SPECS, head_dim_of, spec_of


def test_every_parameter_has_its_axes(
    tiny_model, resolve_model, architecture: str, options: dict
) -> None:
    model = tiny_model(architecture, **options)
    resolved = resolve_model(model)
    found = {n: p.matrices[0] for p in resolved.parameters for n in p.names}
    assert set(found) == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    shapes = {name: model.get_parameter(name).shape for name in found}
    assert {name: len(axes) for name, axes in found.items()} == {
        name: len(shape) for name, shape in shapes.items()
    }
    assert resolved.unordered == {}


def test_spaces_have_the_sizes_and_walls_of_the_config(
    tiny_model, resolve_model, architecture: str, options: dict
) -> None:
    model = tiny_model(architecture, **options)
    config, head_dim = model.config, head_dim_of(model.config)
    spaces = resolve_model(model).spaces
    value = config.num_key_value_heads * head_dim
    assert {name: (space.size, space.segment) for name, space in spaces.items()} == {
        "residual": (config.hidden_size, config.hidden_size),
        "hidden.0": (config.intermediate_size, config.intermediate_size),
        "hidden.1": (config.intermediate_size, config.intermediate_size),
        "value.0": (value, head_dim),
        "value.1": (value, head_dim),
    }
    assert {space.family for space in spaces.values()} == {
        "residual",
        "hidden",
        "value",
    }


def test_every_pruned_linear_reads_one_space(
    tiny_model, resolve_model, architecture: str, options: dict
) -> None:
    model = tiny_model(architecture, **options)
    spaces = resolve_model(model).spaces
    consumers = {
        name: {r.name for r in space.consumers} for name, space in spaces.items()
    }
    layers = [f"model.layers.{i}" for i in range(2)]
    assert consumers == {
        "residual": {
            f"{layer}.{part}"
            for layer in layers
            for part in (
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
            )
        },
        "hidden.0": {"model.layers.0.mlp.down_proj"},
        "hidden.1": {"model.layers.1.mlp.down_proj"},
        "value.0": {"model.layers.0.self_attn.o_proj"},
        "value.1": {"model.layers.1.self_attn.o_proj"},
    }
    queries = model.config.num_attention_heads // model.config.num_key_value_heads
    assert [r.queries for r in spaces["value.1"].consumers] == [queries]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tied_embeddings_are_one_parameter(
    tiny_model, resolve_model, tied: bool
) -> None:
    resolved = resolve_model(tiny_model("llama", tie_word_embeddings=tied))
    together = ("model.embed_tokens.weight", "lm_head.weight")
    assert (together in [p.names for p in resolved.parameters]) == tied


def test_an_unknown_architecture_is_refused_with_the_way_out() -> None:
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(NotImplementedError, match=r"T5EncoderModel.*`spec: FILE`"):
        spec_of(T5EncoderModel(config))


class MyLlama(LlamaForCausalLM):
    """A class of a user's own: its forward may do what Llama's does not."""


NEAR = [
    # the parameters of these have the names that those of a known class have
    pytest.param(MyLlama, LlamaConfig, id="subclass"),
    pytest.param(Olmo3ForCausalLM, Olmo3Config, id="next version"),
    pytest.param(ArceeForCausalLM, ArceeConfig, id="relative"),
]


@pytest.mark.parametrize(("kind", "config"), NEAR)
def test_a_class_near_a_known_one_is_not_taken_for_it(
    kind: type[PreTrainedModel], config: type[PretrainedConfig]
) -> None:
    model = kind(config(**{**TEXT, "num_hidden_layers": 1}))
    with pytest.raises(
        NotImplementedError, match=f"no permutation spec for {kind.__name__}"
    ):
        spec_of(model)


def test_an_unknown_class_is_told_those_with_like_names() -> None:
    unknown = type("LlamaForTokenClassification", (torch.nn.Module,), {})
    with pytest.raises(NotImplementedError) as refusal:
        spec_of(unknown())
    said = str(refusal.value)
    assert "LlamaForSequenceClassification" in said
    assert "`nm-permute spec --list`" in said
    assert len([name for name in SPECS if re.search(rf"\b{name}\b", said)]) <= 3


def test_classes_that_share_the_words_for_a_head_alone_are_not_alike() -> None:
    unknown = type("QuokkaForCausalLM", (torch.nn.Module,), {})
    with pytest.raises(NotImplementedError) as refusal:
        spec_of(unknown())
    assert "Known classes" not in str(refusal.value)


def test_a_plain_module_is_refused_by_its_class() -> None:
    with pytest.raises(NotImplementedError, match="no permutation spec for Linear"):
        spec_of(torch.nn.Linear(2, 2))


def test_the_head_dim_is_stated_or_computed(tiny_model) -> None:
    assert head_dim_of(tiny_model("qwen3", head_dim=16).config) == 16
    assert head_dim_of(tiny_model("qwen2").config) == 8


def test_a_config_without_heads_has_no_head_dim() -> None:
    assert head_dim_of(object()) is None
