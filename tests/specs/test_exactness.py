# SPDX-License-Identifier: Apache-2.0
"""A fold is compared with what was before; one that is wrong is undone and refused."""

import math

import pytest
import torch
from loguru import logger
from torch import Tensor, nn
from zoo import ZOO, tiny

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs import exactness
from nm_permute_plugin.specs.architectures import LLAMA, head_dim_of, spec_of
from nm_permute_plugin.specs.exactness import (
    check_on_few_layers,
    fold_checked,
    outputs_of,
    random_batch,
    random_model,
    random_perms,
)
from nm_permute_plugin.specs.fold import write_in_place
from nm_permute_plugin.specs.spec import ResolvedSpec, Spec, resolve

PATTERN = NMPattern(2, 4)
CASES = {case.id: case.values for case in ZOO}
BIASED = {"attention_bias": True, "mlp_bias": True}


def with_words(changes: dict[str, str]) -> Spec:
    """Llama's spec, with other words for some lines."""
    return {**LLAMA, **changes}


FORGETS_A_BIAS = {"model.layers.{i}.self_attn.v_proj.bias?": "_"}


def fold_all(
    model: nn.Module, spec: Spec, tolerance: float
) -> tuple[float, ResolvedSpec]:
    resolved = resolve(model, spec, PATTERN, [], head_dim_of(model.config))
    batch = random_batch(model)
    perms = random_perms(resolved)
    change = fold_checked(
        model, resolved, perms, lambda: outputs_of(model, batch), tolerance
    )
    return change, resolved


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_a_right_fold_stays(tiny_model) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    weights = copy_of(model)
    change, _ = fold_all(model, LLAMA, 1e-9)
    assert 0 <= change < 1e-9
    assert not same(model, weights)


def test_a_wrong_fold_is_undone_by_its_own_write(tiny_model) -> None:
    model = tiny_model("llama", **BIASED)
    weights, writes = copy_of(model), []

    def write(owner: nn.Module, name: str, tensor: Tensor) -> None:
        writes.append(name)
        write_in_place(owner, name, tensor)

    spec = with_words(FORGETS_A_BIAS)
    resolved = resolve(model, spec, PATTERN, [], head_dim_of(model.config))
    batch = random_batch(model)
    message = r"changed the model's outputs by .* torch\.float32 .* as they were"
    with pytest.raises(RuntimeError, match=message):
        fold_checked(
            model,
            resolved,
            random_perms(resolved),
            lambda: outputs_of(model, batch),
            1e-3,
            write,
        )
    assert same(model, weights)
    assert len(writes) == 2 * sum(bool(p.spaces) for p in resolved.parameters)


def moved_by(perms: dict[str, Tensor], outputs, resolve_model, model) -> float:
    return fold_checked(model, resolve_model(model), perms, outputs, math.inf)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_the_change_is_relative_to_the_norm_whatever_the_chunks(
    tiny_model, resolve_model, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(exactness, "CHUNK", chunk)
    before = torch.arange(12.0).reshape(3, 4).bfloat16().t()
    given = iter([{"a": before, "b": before}, {"a": before, "b": before + 1}])
    change = moved_by({}, lambda: next(given), resolve_model, tiny_model("llama"))
    expected = math.sqrt(12) / before.double().norm()
    assert change == pytest.approx(float(expected))


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("after", [NAN, INF])
def test_outputs_that_are_lost_count_as_an_infinite_change(
    tiny_model, resolve_model, after: float
) -> None:
    ones = {"a": torch.ones(2), "b": torch.ones(2)}
    given = iter([ones, {**ones, "b": torch.tensor([1.0, after])}])
    assert moved_by({}, lambda: next(given), resolve_model, tiny_model("llama")) == INF


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"logits": torch.tensor([1.0, NAN])}, r"not finite \(logits\)"),
        ({"x": torch.ones(2), "logits": torch.zeros(2)}, "output logits is zero"),
        ({}, "no output"),
    ],
    ids=["nan", "zero", "none"],
)
def test_outputs_that_would_show_nothing_are_refused_before_the_fold(
    tiny_model, resolve_model, legal_perms, outputs: dict[str, Tensor], message: str
) -> None:
    model = tiny_model("llama")
    resolved, weights = resolve_model(model), copy_of(model)
    with pytest.raises(ValueError, match=message):
        fold_checked(model, resolved, legal_perms(resolved), lambda: outputs, 1.0)
    assert same(model, weights)


def test_16_bits_hide_a_forgotten_bias_that_a_few_layers_show(tiny_model) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=4, **BIASED)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias.mul_(0.01)
    weights, spec = copy_of(model), with_words(FORGETS_A_BIAS)
    change, _ = fold_all(model, spec, 0.05)
    assert change > 1e-4
    model.load_state_dict(weights)
    with pytest.raises(RuntimeError) as refused:
        check_on_few_layers(model, spec, PATTERN)
    assert "LlamaForCausalLM with 2 layers" in str(refused.value)
    assert "The permutations of value.{0-1} do it." in str(refused.value)
    assert "model.layers.{0-1}.self_attn.v_proj.bias." in str(refused.value)
    assert same(model, weights)


@pytest.mark.parametrize(
    "case",
    [
        "llama-mha-tied",
        "gemma3-gqa",
        "qwen2moe-one-dense-layer",
        "gpt2-three-heads",
        "opt-350m",
        "bertforsequenceclassification",
        "dinov2-labels",
        "siglip",
        "qwen2.5-vl",
    ],
)
def test_a_right_spec_passes_on_one_layer(case: str) -> None:
    name, config, options = CASES[case]
    model = tiny(name, config, options, torch.bfloat16)
    weights = copy_of(model)
    random = torch.random.get_rng_state()
    change = check_on_few_layers(model, spec_of(model), PATTERN, layers=1)
    assert change is not None
    assert change < 1e-9
    assert same(model, weights)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_the_size_of_a_large_model_is_cut(tiny_model) -> None:
    """Layers, tokens and experts are; widths are not, and the config is not touched."""
    name, config, options = CASES["gemma3-gqa"]
    large = {
        **options,
        "vocab_size": 5000,
        "pad_token_id": 4999,
        "eos_token_id": 4998,
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    }
    model = tiny(name, config, large, torch.float32)
    small = random_model(type(model), model.config, layers=2)
    assert len(small.model.layers) == 2
    assert small.config.layer_types == ["sliding_attention", "full_attention"]
    assert small.lm_head.weight.shape == (1024, 32)
    assert model.config.vocab_size == 5000
    assert check_on_few_layers(model, spec_of(model), PATTERN) is not None
    name, config, options = CASES["qwen3moe-gqa"]
    model = tiny(name, config, options | {"num_experts": 20}, torch.float32)
    small = random_model(type(model), model.config, layers=2)
    assert small.config.num_experts == 8


def test_lines_of_deeper_layers_are_not_missed(tiny_model) -> None:
    """Of a model whose last layer has a line of its own."""
    model = tiny_model("llama", num_hidden_layers=3)
    up = "model.layers.{i}.mlp.{gate,up}_proj.weight"
    lines = {line: words for line, words in LLAMA.items() if line != up}
    lines |= {up.replace("{i}", str(i)): LLAMA[up].format(i=i) for i in range(3)}
    assert check_on_few_layers(model, lines, PATTERN) is not None


class Unknown(nn.Module):
    """A model that no config builds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)


def without_norm(model: nn.Module) -> nn.Module:
    """The model, changed since its config built it."""
    model.model.norm = nn.Identity()
    return model


@pytest.mark.parametrize("known", [True, False], ids=["changed", "no config"])
def test_what_cannot_be_built_again_is_told_and_left_to_the_model(
    tiny_model, known: bool
) -> None:
    model = without_norm(tiny_model("llama")) if known else Unknown()
    spec = {line: words for line, words in LLAMA.items() if line != "model.norm.weight"}
    told: list[str] = []
    sink = logger.add(told.append, level="WARNING")
    assert check_on_few_layers(model, spec, PATTERN) is None
    logger.remove(sink)
    (text,) = told
    assert f"not checked in float64: a {type(model).__name__} with 2 layers" in text


def test_every_wrong_space_is_told(tiny_model) -> None:
    """Of a spec that forgets a norm's weight, the residual stream."""
    model = tiny_model("llama", hidden_size=40, head_dim=8)
    spec = with_words({"model.norm.weight": "_"})
    message = (
        r"permutations of residual do it.* move with them: model\.norm\.weight\. The"
    )
    with pytest.raises(RuntimeError, match=message):
        check_on_few_layers(model, spec, PATTERN)
