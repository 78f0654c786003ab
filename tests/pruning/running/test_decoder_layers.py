# SPDX-License-Identifier: Apache-2.0
"""Decoder layers are found, and run one by one they do what the model does."""

import pytest
import torch
from torch import Tensor, nn

from nm_permute_plugin.pruning.running.decoder_layers import (
    calls_of,
    check_layers,
    decoder_layers,
    run_layers,
)

DOWN = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


@pytest.fixture
def padded(tokens: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def hidden_states(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """What leaves every layer inside of the model."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, out: seen.append(out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_layers_run_one_by_one_as_inside_of_the_model(
    tiny_model, padded, architecture: str
) -> None:
    options = {"mistral": {"sliding_window": 4}}.get(architecture, {})
    model = tiny_model(architecture, **options)
    layers = decoder_layers(model, DOWN)
    assert layers.names == ("model.layers.0", "model.layers.1")
    for batch in ({"input_ids": padded["input_ids"]}, padded):
        first, second = hidden_states(model, batch)
        calls = calls_of(model, layers, batch)
        assert torch.equal(calls.hidden, model.model.embed_tokens(batch["input_ids"]))
        with torch.no_grad():
            assert torch.equal(run_layers(layers, calls, range(1), calls.hidden), first)
            assert torch.equal(run_layers(layers, calls, range(1, 2), first), second)
    check_layers(model, layers, [padded])


def test_every_layer_gets_its_own_mask(tiny_model, padded) -> None:
    types = ["full_attention", "sliding_attention"]
    model = tiny_model(
        "qwen2", use_sliding_window=True, sliding_window=4, layer_types=types
    )
    layers = decoder_layers(model, DOWN)
    calls = calls_of(model, layers, padded)
    full, sliding = (kwargs["attention_mask"] for _, kwargs in calls.others)
    assert not torch.equal(full, sliding)
    check_layers(model, layers, [padded])


def test_no_layer_runs_while_calls_are_recorded(tiny_model, tokens) -> None:
    model = tiny_model("llama")
    ran: list[nn.Module] = []
    for name in ("model.norm", "lm_head", *DOWN):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, out: ran.append(module)
        )
    layers = decoder_layers(model, DOWN)
    calls_of(model, layers, {"input_ids": tokens})
    assert ran == []
    model(tokens, use_cache=False)
    assert len(ran) == 4


def test_a_linear_outside_of_the_layers_is_refused(tiny_model) -> None:
    with pytest.raises(ValueError, match="lm_head stands outside of model.layers: add"):
        decoder_layers(tiny_model("llama"), [*DOWN, "lm_head"])


def test_a_model_without_layers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="0 stands in a model without such a list"):
        decoder_layers(model, ["0"])


def test_layers_that_do_not_follow_each_other_are_refused(tiny_model, tokens) -> None:
    model = tiny_model("llama")
    model.model.layers.insert(1, model.model.layers[0])
    layers = decoder_layers(model, DOWN)  # three entries, and the model runs two
    with pytest.raises(ValueError, match="do not run one after the other on their own"):
        check_layers(model, layers, [{"input_ids": tokens}])
