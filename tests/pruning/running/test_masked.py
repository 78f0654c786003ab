# SPDX-License-Identifier: Apache-2.0
"""Masked linears: autograd's own gradients, and forwards that come back."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from nm_permute_plugin.pruning.running.masked import frozen, masked


def inputs(
    generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [2, 5, 6], weight [3, 6], bias [3] and a soft mask [3, 6]."""
    x = torch.randn(2, 5, 6, generator=generator, dtype=dtype)
    weight = torch.randn(3, 6, generator=generator, dtype=dtype)
    bias = torch.randn(3, generator=generator, dtype=dtype)
    mask = torch.rand(3, 6, generator=generator, dtype=dtype)
    return x.requires_grad_(True), weight, bias, mask.requires_grad_(True)


def run_masked(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """A linear of that weight and bias under a mask."""
    model = nn.Sequential(nn.Linear(6, 3, bias=bias is not None, dtype=weight.dtype))
    model[0].weight = nn.Parameter(weight)
    if bias is not None:
        model[0].bias = nn.Parameter(bias)
    with masked(model, {"0": mask}):
        return model(x)


def test_gradients_equal_finite_differences(generator: torch.Generator) -> None:
    x, weight, bias, mask = inputs(generator)
    assert torch.autograd.gradcheck(
        lambda x, mask: run_masked(x, weight, bias, mask), (x, mask)
    )


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("flat", [True, False], ids=["2d", "3d"])
def test_values_and_gradients_equal_those_of_a_plain_linear(
    generator: torch.Generator, with_bias: bool, flat: bool
) -> None:
    x, weight, bias, mask = inputs(generator)
    x = x.detach()[0].requires_grad_(True) if flat else x
    bias = bias if with_bias else None
    ours = run_masked(x, weight, bias, mask)
    plain = F.linear(x, weight * mask, bias)
    assert torch.equal(ours, plain)
    towards = torch.randn(plain.shape, generator=generator, dtype=plain.dtype)
    found = torch.autograd.grad(ours, (x, mask), towards)
    expected = torch.autograd.grad(plain, (x, mask), towards)
    for of_ours, of_plain in zip(found, expected, strict=True):
        torch.testing.assert_close(of_ours, of_plain)


def test_a_mask_without_gradients_passes_those_of_the_input(
    generator: torch.Generator,
) -> None:
    x, weight, bias, mask = inputs(generator)
    run_masked(x, weight, bias, mask.detach()).sum().backward()
    expected = (weight * mask.detach()).sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool], ids=["bf16", "bool"])
def test_short_formats_stay_short(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    x, weight, bias, mask = (
        tensor.detach().bfloat16() for tensor in inputs(generator, torch.float32)
    )
    mask = (mask > 0.5).to(dtype)
    out = run_masked(x, weight, bias, mask)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.linear(x, weight.masked_fill(mask == 0, 0), bias))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))


def test_masks_act_while_the_context_lasts(
    model: nn.Module, generator: torch.Generator
) -> None:
    x = torch.randn(5, 6, generator=generator)
    masks = {"0": torch.rand(4, 6, generator=generator), "2": torch.zeros(3, 4)}
    before = model(x)
    with masked(model, {"0": masks["0"]}):
        inside = model(x)
    hidden = F.linear(x, model[0].weight * masks["0"], model[0].bias)
    assert torch.equal(inside, model[2](torch.tanh(hidden)))
    with masked(model, masks):
        assert torch.equal(model(x), torch.zeros(5, 3))
    assert torch.equal(model(x), before)


def test_forwards_come_back_after_an_exception(model: nn.Module) -> None:
    with pytest.raises(KeyError), masked(model, {"0": torch.zeros(4, 6)}):
        raise KeyError
    assert "forward" not in model[0].__dict__


def test_forwards_come_back_when_a_name_is_unknown(model: nn.Module) -> None:
    masks = {"0": torch.zeros(4, 6), "nothing": torch.zeros(1, 1)}
    with pytest.raises(AttributeError, match="nothing"), masked(model, masks):
        pass
    assert "forward" not in model[0].__dict__


def test_contexts_nest(model: nn.Module, generator: torch.Generator) -> None:
    x = torch.randn(5, 6, generator=generator)
    outer, inner = torch.ones(3, 4), torch.zeros(3, 4)
    before = model(x)
    with masked(model, {"2": outer}):
        with masked(model, {"2": inner}):
            assert torch.equal(model(x), torch.zeros(5, 3))
        assert torch.equal(model(x), before)
    assert "forward" not in model[2].__dict__


def test_a_forward_that_the_host_set_comes_back(model: nn.Module) -> None:
    own = model[0].forward
    model[0].forward = own
    with masked(model, {"0": torch.zeros(4, 6)}):
        assert model[0].forward is not own
    assert model[0].forward is own


def test_a_module_with_two_names_gets_its_forward_back(model: nn.Module) -> None:
    model.again = model[0]
    with masked(model, {"0": torch.zeros(4, 6), "again": torch.zeros(4, 6)}):
        assert "forward" in model[0].__dict__
    assert "forward" not in model[0].__dict__


def test_weights_get_no_gradients(model: nn.Module, generator: torch.Generator) -> None:
    mask = torch.ones(4, 6, requires_grad=True)
    with masked(model, {"0": mask}):
        model(torch.randn(5, 6, generator=generator)).sum().backward()
    assert model[0].weight.grad is None
    assert mask.grad is not None


def test_a_conv1d_multiplies_by_a_mask_over_its_inputs(
    generator: torch.Generator,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(4, 6))
    nn.init.normal_(model[0].bias)
    x = torch.randn(5, 6, generator=generator)
    mask = torch.rand(4, 6, generator=generator).requires_grad_(True)
    with masked(model, {"0": mask}):
        inside = model(x)
    expected = F.linear(x, model[0].weight.t() * mask, model[0].bias)
    assert torch.equal(inside, expected)
    inside.sum().backward()
    torch.testing.assert_close(mask.grad, x.sum(0) * model[0].weight.t().detach())


def test_what_is_no_linear_is_not_masked() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    with (
        pytest.raises(ValueError, match="0 is a LayerNorm"),
        masked(model, {"0": torch.ones(4, 1)}),
    ):
        pass


def test_a_function_gives_the_whole_output(model: nn.Module) -> None:
    x = torch.randn(5, 6)
    with masked(model, {"0": lambda x: x[:, :4]}):
        assert torch.equal(model(x), model[2](torch.tanh(x[:, :4])))


class Counted:
    """A mask of ones, which says when its gradient is used."""

    def __init__(self, name: str, shape: tuple[int, int], order: list[str]) -> None:
        self.ones, self.name, self.order = torch.ones(shape), name, order
        self.parameters = (torch.zeros((), requires_grad=True),)

    def kept(self) -> Tensor:
        return self.ones.bool()

    def gradients(self, of_mask: Tensor) -> tuple[Tensor, ...]:
        self.order.append(self.name)
        return (of_mask.sum(),)


def test_a_learned_mask_makes_the_gradients_of_its_parameters(
    model: nn.Module, generator: torch.Generator
) -> None:
    x = torch.randn(5, 6, generator=generator)
    mask, plain = Counted("0", (4, 6), []), torch.ones(4, 6, requires_grad=True)
    for each in (mask, plain):
        with masked(model, {"0": each}):
            model(x).square().sum().backward()
    torch.testing.assert_close(mask.parameters[0].grad, plain.grad.sum())


def test_the_gradient_of_a_mask_does_not_outlive_its_layer(model: nn.Module) -> None:
    """Of two linears in a row, the second's is used up before the first's is made."""
    order: list[str] = []
    masks = {"0": Counted("0", (4, 6), order), "2": Counted("2", (3, 4), order)}
    model[1].register_full_backward_hook(lambda *rest: order.append("between"))
    with masked(model, masks):
        model(torch.randn(5, 6)).sum().backward()
    assert order == ["2", "between", "0"]


def test_frozen_weights_are_freed_after_an_exception(model: nn.Module) -> None:
    model[2].weight.requires_grad_(False)
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]
