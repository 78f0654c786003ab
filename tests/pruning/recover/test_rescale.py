# SPDX-License-Identifier: Apache-2.0
"""Rows get the dense output's energy; what is padded does not count."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_models import zoo_batches, zoo_model

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.recover.rescale import rescaled
from nm_permute_plugin.pruning.recover.student import Student

K = "model.layers.0.self_attn.k_proj"  # has a bias in Qwen 2


def student_of(model: nn.Module) -> Student:
    weight = model.get_submodule(K).weight.detach()
    return Student(model, {K: nm_mask(weight.abs(), NMPattern(2, 4))})


def inputs_of(model: nn.Module, tokens: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(K).register_forward_hook(
        lambda module, inputs, out: seen.append(inputs[0].detach())
    )
    with torch.no_grad():
        model(tokens, use_cache=False)
    hook.remove()
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_row_has_the_dense_energy(tiny_model, tokens, architecture: str) -> None:
    model = tiny_model(architecture)
    student = student_of(model)
    values = rescaled(student, [{"input_ids": tokens[:2]}, {"input_ids": tokens[2:]}])
    assert set(values) == {f"{K}.weight"}
    x = inputs_of(model, tokens)
    dense = F.linear(x, model.get_submodule(K).weight.detach())
    ours = F.linear(x, values[f"{K}.weight"])
    torch.testing.assert_close(ours.square().sum(0), dense.square().sum(0))
    before = F.linear(x, student.values[f"{K}.weight"])
    assert not torch.allclose(before.square().sum(0), dense.square().sum(0), rtol=0.05)


def test_planted_factors_are_found(tiny_model, tokens, generator) -> None:
    model = tiny_model("llama")
    student = student_of(model)
    with torch.no_grad():  # a dense model that loses nothing by the mask
        model.get_submodule(K).weight.copy_(student.values[f"{K}.weight"])
    right = student.values[f"{K}.weight"]
    factors = torch.rand(len(right), 1, generator=generator) + 0.5
    student.values[f"{K}.weight"] = right * factors
    values = rescaled(student, [{"input_ids": tokens}])
    torch.testing.assert_close(values[f"{K}.weight"], right)


def test_padding_does_not_count(tiny_model, tokens) -> None:
    student = student_of(tiny_model("llama"))
    mask = torch.ones_like(tokens)
    mask[:, 8:] = 0
    padded = rescaled(student, [{"input_ids": tokens, "attention_mask": mask}])
    short = rescaled(student, [{"input_ids": tokens[:, :8]}])
    torch.testing.assert_close(padded[f"{K}.weight"], short[f"{K}.weight"])


def test_padding_does_not_count_where_tokens_are_flattened(tokens) -> None:
    model = zoo_model("qwen2moe-gqa")
    name = "model.layers.1.mlp.shared_expert.down_proj"
    weight = model.get_submodule(name).weight.detach()
    student = Student(model, {name: nm_mask(weight.abs(), NMPattern(2, 4))})
    tokens = tokens.clamp_min(1)  # 0 is the padding of this model
    mask = torch.ones_like(tokens)
    mask[:, 8:] = 0
    padded = rescaled(student, [{"input_ids": tokens, "attention_mask": mask}])
    short = rescaled(student, [{"input_ids": tokens[:, :8]}])
    torch.testing.assert_close(padded[f"{name}.weight"], short[f"{name}.weight"])


def test_padding_of_a_sample_with_images_does_not_count() -> None:
    model = zoo_model("qwen2.5-vl")
    (batch,) = zoo_batches(model, 1)
    name = "model.language_model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach()
    student = Student(model, {name: nm_mask(weight.abs(), NMPattern(2, 4))})
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -4:] = 0
    first, second = (
        rescaled(student, [batch | {"input_ids": ids, "attention_mask": mask}])
        for ids in (batch["input_ids"], batch["input_ids"].masked_fill(mask == 0, 7))
    )
    torch.testing.assert_close(first[f"{name}.weight"], second[f"{name}.weight"])


def test_a_row_that_gives_nothing_stays(tiny_model, tokens) -> None:
    student = student_of(tiny_model("llama"))
    student.values[f"{K}.weight"][3] = 0
    weight = rescaled(student, [{"input_ids": tokens}])[f"{K}.weight"]
    assert bool(weight.isfinite().all())
    assert torch.equal(weight[3], torch.zeros(32))


def test_no_hook_stays(tiny_model, tokens) -> None:
    model = tiny_model("llama")
    rescaled(student_of(model), [{"input_ids": tokens}])
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0
