# SPDX-License-Identifier: Apache-2.0
"""The student runs beside the dense model, which stays; what a mask drops stays zero."""

import pytest
import torch
from torch import Tensor, nn

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.recover.student import Student
from nm_permute_plugin.pruning.running.masked import masked
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import LossSettings
from nm_permute_plugin.specs.fold import write_in_place

MIXED = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")


def magnitude_masks(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {
        name: nm_mask(
            model.get_submodule(name).weight.detach().abs().float(), NMPattern(2, 4)
        )
        for name in names
    }


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.fixture
def model(tiny_model) -> nn.Module:
    return tiny_model("qwen2")  # k_proj has a bias, down_proj has none


@pytest.fixture
def student(model) -> Student:
    return Student(model, magnitude_masks(model, MIXED))


def test_the_values_are_weights_and_biases(student: Student) -> None:
    k, down = MIXED
    assert set(student.values) == {f"{k}.weight", f"{k}.bias", f"{down}.weight"}
    assert student.linears == MIXED


def test_the_pruned_model_runs_beside_the_dense_one(
    model, student: Student, tokens
) -> None:
    dense = logits_of(model, tokens)
    with masked(model, student.masks()):
        beside = logits_of(model, tokens)
    assert not torch.equal(beside, dense)
    assert torch.equal(logits_of(model, tokens), dense)
    student.write(write_in_place)
    assert torch.equal(logits_of(model, tokens), beside)


def test_values_put_in_go_before_and_count_as_zero_where_dropped(
    model, student: Student, tokens
) -> None:
    k, down = MIXED
    with masked(model, student.masks()):
        pruned = logits_of(model, tokens)
    dense_weight = {f"{down}.weight": model.get_submodule(down).weight.detach()}
    with masked(model, student.masks(dense_weight)):
        assert torch.equal(logits_of(model, tokens), pruned)
    bias = {f"{k}.bias": student.values[f"{k}.bias"] + 1}
    with masked(model, student.masks(bias)):
        assert not torch.equal(logits_of(model, tokens), pruned)


def test_gradients_reach_what_is_kept_and_nothing_else(
    model, student: Student, tokens
) -> None:
    masters = student.masters(MIXED)
    with masked(model, student.masks(masters)):
        model(tokens, use_cache=False).logits.square().mean().backward()
    for name in MIXED:
        dropped = student.values[f"{name}.weight"] == 0
        assert bool((masters[f"{name}.weight"].grad[dropped] == 0).all())
        assert bool((masters[f"{name}.weight"].grad[~dropped] != 0).all())
    assert bool((masters[f"{MIXED[0]}.bias"].grad != 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rounding_keeps_the_dtype_and_writes_no_negative_zero(
    tiny_model, dtype: torch.dtype
) -> None:
    model = tiny_model("llama", dtype=dtype)
    student = Student(model, magnitude_masks(model, MIXED))
    masters = {name: -value.float() - 0.1 for name, value in student.values.items()}
    rounded = student.rounded(masters)
    for name, value in rounded.items():
        dropped = student.values[name] == 0
        assert value.dtype == dtype
        assert torch.equal(value == 0, dropped)
        assert not bool(torch.signbit(value[dropped]).any())
        assert torch.equal(value[~dropped], masters[name][~dropped].to(dtype))


def test_masters_are_copies(student: Student) -> None:
    before = {name: value.clone() for name, value in student.values.items()}
    with torch.no_grad():
        for master in student.masters(MIXED).values():
            master.add_(1)
    assert [n for n in before if not torch.equal(before[n], student.values[n])] == []


def test_a_write_goes_through_the_callback(model, student: Student) -> None:
    before = weights_of(model)
    written = []
    student.write(lambda owner, leaf, value: written.append((owner, leaf, value.shape)))
    k, down = map(model.get_submodule, MIXED)
    assert [(owner, leaf) for owner, leaf, _ in written] == [
        (k, "weight"),
        (k, "bias"),
        (down, "weight"),
    ]
    after = weights_of(model)
    assert [n for n in before if not torch.equal(before[n], after[n])] == []


def test_the_loss_of_a_mask_that_drops_nothing_is_zero(model, tokens) -> None:
    masks = {MIXED[0]: torch.ones(16, 32, dtype=torch.bool)}
    teacher = Teacher(model, LossSettings())
    loss = teacher.validate(Student(model, masks).masks(), [{"input_ids": tokens}])
    assert abs(loss) < 1e-6
