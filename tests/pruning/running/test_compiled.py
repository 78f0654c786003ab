# SPDX-License-Identifier: Apache-2.0
"""Compiled parts compute what the model computes, and leave it as it was."""

import sys

import pytest
import torch
from compressed_tensors import offload
from torch import Tensor, nn

from nm_permute_plugin.pruning.running import compiled as module
from nm_permute_plugin.pruning.running.compiled import compiled_elementwise


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is compiled; TorchDynamo traces it, and nothing is made of the graphs."""
    seen: list[object] = []
    whole = module._compiled

    def follow(function):
        seen.append(function)
        return whole(function)

    monkeypatch.setattr(module, "BACKEND", "eager")
    monkeypatch.setattr(module, "_is_on_one_gpu", lambda model: True)
    monkeypatch.setattr(module, "_compiled", follow)
    return seen


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_model_gives_what_it_gave_with_its_gradients(
    tiny_model, tokens: Tensor, compiled, kind: str
) -> None:
    model = tiny_model(kind)

    def outcome() -> list[Tensor]:
        model.zero_grad()
        out = model(input_ids=tokens, use_cache=False).logits
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = outcome()
    rotary = sys.modules[type(model).__module__].apply_rotary_pos_emb
    with compiled_elementwise(model, 1000):
        assert sys.modules[type(model).__module__].apply_rotary_pos_emb is not rotary
        found = outcome()
    assert sys.modules[type(model).__module__].apply_rotary_pos_emb is rotary
    assert not any("forward" in part.__dict__ for part in model.modules())
    # the trial, the rotary embedding, a norm, the activation
    assert len(compiled) == 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def plus(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


def clamped(self, x):
    gate = self.act_fn(self.gate_proj(x)).clamp(max=50)
    return self.down_proj(gate * self.up_proj(x))


def called_otherwise(self, x, *, scale=None):
    if scale is None and x.dim() == 2:
        raise TypeError("scale is missing")
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("forward", [plus, clamped, called_otherwise])
def test_another_feed_forward_layer_is_left_alone(
    tiny_model, tokens: Tensor, compiled, forward
) -> None:
    model = tiny_model("llama")

    kind = type("OtherMLP", (type(model.model.layers[0].mlp),), {"forward": forward})
    for layer in model.model.layers:
        layer.mlp.__class__ = kind
    expected = model(input_ids=tokens).logits
    with compiled_elementwise(model, 1000):
        assert "forward" not in model.model.layers[0].mlp.__dict__
        torch.testing.assert_close(model(input_ids=tokens).logits, expected)


def test_a_layer_with_an_activation_of_its_own_keeps_it(
    tiny_model, tokens: Tensor, compiled
) -> None:
    model = tiny_model("llama", hidden_act="prelu")
    for number, layer in enumerate(model.model.layers):
        layer.mlp.act_fn.weight.data.fill_(0.25 + number)
    expected = model(input_ids=tokens).logits
    with compiled_elementwise(model, 1000):
        torch.testing.assert_close(model(input_ids=tokens).logits, expected)


def test_no_norm_of_a_step_is_left_to_python(
    tiny_model, tokens: Tensor, compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of Qwen3 have more variants than TorchDynamo compiles of one function."""
    model, traced = tiny_model("qwen3"), []
    kind = type(model.model.norm)
    whole = kind.forward

    def counted(self, x):
        if not torch.compiler.is_compiling():
            traced.append(x.shape)
        return whole(self, x)

    monkeypatch.setattr(kind, "forward", counted)
    with compiled_elementwise(model, 1000):
        for frozen in (False, True):
            model.requires_grad_(not frozen)
            for rows in (tokens[:1], tokens, tokens[:, :7], tokens[:2, :5]):
                with torch.no_grad():
                    model(input_ids=rows, use_cache=False)
                embedded = model.model.embed_tokens(rows).detach().requires_grad_()
                model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    assert traced == []


def test_runs_beside_each_other_leave_the_rotary_embedding_as_it_was(
    tiny_model, compiled
) -> None:
    model = tiny_model("llama")
    place = sys.modules[type(model).__module__]
    rotary = place.apply_rotary_pos_emb
    first, second = (compiled_elementwise(tiny_model("llama"), 1000) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert place.apply_rotary_pos_emb is rotary


def test_a_class_of_no_known_module_is_passed_over(
    tiny_model, tokens: Tensor, compiled
) -> None:
    model = tiny_model("llama")
    kind = type(model.model.norm)
    model.model.norm.__class__ = type("Other", (kind,), {"__module__": "gone"})
    expected = model(input_ids=tokens).logits
    with compiled_elementwise(model, 1000):
        torch.testing.assert_close(model(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("reason_given", ["no compiler\nat all", ""])
@pytest.mark.parametrize("reason", ["a CPU", "few steps", "no compiler"])
def test_nothing_is_compiled_where_nothing_would_be_gained(
    tiny_model,
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
    reason_given: str,
) -> None:
    model = tiny_model("llama")
    if reason != "a CPU":
        monkeypatch.setattr(module, "_is_on_one_gpu", lambda model: True)
    if reason == "no compiler":

        def fail(function):
            raise RuntimeError(reason_given)

        monkeypatch.setattr(module, "_compiled", fail)
    with compiled_elementwise(model, 99 if reason == "few steps" else 1000):
        assert not any("forward" in part.__dict__ for part in model.modules())
        assert isinstance(model(input_ids=tokens).logits, Tensor)


def test_weights_that_the_host_holds_are_followed(
    tiny_model, tokens: Tensor, compiled
) -> None:
    """As those of a model that llm-compressor has placed on one GPU, after a fold too."""
    model = tiny_model("llama")
    for part in list(model.modules()):
        offload.offload_module(part, "cpu", "cpu")
    forward = model.model.norm.__dict__["forward"]
    assert not any(map(module._is_hooked, model.modules()))
    with torch.no_grad(), compiled_elementwise(model, 1000):
        before = model(input_ids=tokens, use_cache=False).logits
        offload.update_offload_parameter(
            model.model.norm, "weight", 2 * model.model.norm.weight
        )
        after = model(input_ids=tokens, use_cache=False).logits
    assert model.model.norm.__dict__["forward"] is forward
    torch.testing.assert_close(after, 2 * before)
    torch.testing.assert_close(model(input_ids=tokens).logits, after)


def test_a_model_that_is_moved_or_run_in_another_way_is_left_alone(
    tiny_model, offload_to, tmp_path
) -> None:
    model: nn.Module = tiny_model("llama")
    assert not module._is_hooked(model.model.norm)
    model.model.norm.__dict__["forward"] = lambda x: x
    assert module._is_hooked(model.model.norm)
    other = tiny_model("llama")
    offload_to(other, "disk", tmp_path)
    assert module._is_hooked(other.model.norm)
