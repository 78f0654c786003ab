# SPDX-License-Identifier: Apache-2.0
"""Models and specs that do not go together are refused, the parameter named."""

import pytest
import torch
from torch import nn
from zoo import CLIP, TEXT, VISION, tiny

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs.architectures import LLAMA, head_dim_of, spec_of
from nm_permute_plugin.specs.spec import ResolvedSpec, Spec, resolve


def resolve_it(model: nn.Module, spec: Spec | None = None) -> ResolvedSpec:
    spec = spec_of(model) if spec is None else spec
    return resolve(model, spec, NMPattern(2, 4), [], head_dim_of(model.config))


def llama(**options) -> nn.Module:
    return tiny("LlamaForCausalLM", "LlamaConfig", {**TEXT, **options}, torch.float32)


DOWN = "model.layers.{i}.mlp.down_proj.weight"
WRONG = [
    pytest.param({DOWN: "residual hiden.{i}"}, "'hiden.{i}' is no word", id="family"),
    pytest.param(
        {DOWN: "residual hidden.down.{i}"},
        r"space hidden\.down\.0 is named by model\.layers\.0\.mlp\.down_proj\.weight",
        id="a space of its own",
    ),
    pytest.param(
        {"model.layers.{i}.mlp.scale.weight": "residual"},
        r"line 'model\.layers\.\{i\}\.mlp\.scale\.weight' fits no parameter",
        id="missing weight",
    ),
    pytest.param({DOWN: "residual residual"}, "claims a space twice", id="twice"),
    pytest.param(
        {DOWN: "hidden.{i} residual"},
        r"space residual differ in size.*down_proj\.weight has 48",
        id="swapped",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_line_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_it(llama(), {**LLAMA, **change})


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("ViTForImageClassification", "ViTConfig", VISION),
        ("CLIPModel", "CLIPConfig", CLIP),
        ("Qwen3ForCausalLM", "Qwen3Config", TEXT),
    ],
)
def test_a_class_that_gained_a_parameter_is_refused(
    name: str, config: str, options: dict
) -> None:
    model = tiny(name, config, options, torch.float32)
    module = next(m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.Linear))
    module.scale = nn.Parameter(torch.ones(module.weight.shape[0]))
    with pytest.raises(ValueError, match=r"parameter \S+\.scale \(\d+,\).* no line"):
        resolve_it(model)


def test_a_model_of_another_class_is_refused_by_its_first_parameter() -> None:
    model = tiny("Qwen3ForCausalLM", "Qwen3Config", TEXT, torch.float32)
    with pytest.raises(ValueError, match=r"self_attn\.q_norm\.weight .*no line"):
        resolve_it(model, LLAMA)


def test_heads_that_do_not_divide_are_refused() -> None:
    model = llama()
    model.config.head_dim = 6
    with pytest.raises(ValueError, match=r"space value\.0 has 16 channels.*heads of 6"):
        resolve_it(model)


def test_query_heads_that_do_not_share_evenly_are_refused() -> None:
    model = llama()
    model.model.layers[1].self_attn.o_proj = nn.Linear(24, 32, bias=False)
    message = r"layers\.1\.self_attn\.o_proj\.weight has 24 channels, no multiple"
    with pytest.raises(ValueError, match=message):
        resolve_it(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_quantized_weight_is_refused(dtype: torch.dtype) -> None:
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(dtype)
    with pytest.raises(
        ValueError, match=r"mlp\.up_proj\.weight is .*quantized already"
    ):
        resolve_it(model)


def test_a_model_without_values_is_refused() -> None:
    model = llama().to("meta")
    message = r"parameter model\.embed_tokens\.weight is on the meta device"
    with pytest.raises(ValueError, match=message):
        resolve_it(model)


def test_a_table_that_is_a_buffer_is_refused_until_a_line_names_it() -> None:
    model = llama()
    model.model.register_buffer("positions", torch.randn(64, 32))
    with pytest.raises(ValueError, match=r"buffer model\.positions \(64, 32\)"):
        resolve_it(model)
    resolved = resolve_it(model, {**LLAMA, "model.positions": "_ residual"})
    assert "model.positions" in {p.names[0] for p in resolved.parameters}


def test_two_towers_have_heads_of_their_own() -> None:
    model = tiny("CLIPModel", "CLIPConfig", CLIP, torch.float32)
    assert head_dim_of(model.config) == {"value": 4, "value.vision": 8}
    spaces = resolve_it(model).spaces
    assert spaces["value.text.0"].segment == 4
    assert spaces["value.vision.0"].segment == 8


def test_a_linear_that_no_space_orders_is_listed_with_the_reason() -> None:
    model = tiny("ViTModel", "ViTConfig", VISION, torch.float32)
    linears = ["layers.0.mlp.fc1", "layers.0.mlp.fc2", "pooler.dense"]
    resolved = resolve(
        model, spec_of(model), NMPattern(2, 4), linears, head_dim_of(model.config)
    )
    assert resolved.unordered == {
        "layers.0.mlp.fc1": "output",
        "pooler.dense": "output",
    }
