# SPDX-License-Identifier: Apache-2.0
"""Run a model with masked weights, with gradients for the masks and frozen weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nm_permute_plugin.specs.conv1d import bias_of, is_linear, weight_of

Mask = Tensor | Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""1 or True where a weight is kept, [out, in]; or a function of the input, the weight and
the bias that gives the masked linear's output."""


class MaskedLinear(torch.autograd.Function):
    """
    ``x (W * mask)^T + b``. The masked weight is made anew in backward, never stored.

    The gradient of the mask is the gradient of the masked weight times ``W``: to first
    order, what the loss loses when the mask opens by one.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        return F.linear(x, weight * mask, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, mask = ctx.saved_tensors
        grad_x = grad_mask = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (weight * mask)
        if ctx.needs_input_grad[3]:
            of_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
            grad_mask = of_weight * weight
        return grad_x, None, None, grad_mask


@contextmanager
def masked(model: nn.Module, masks: Mapping[str, Mask]) -> Iterator[None]:
    """
    Let the named linears multiply by their masks while the context lasts.

    :param masks: by module name; as a tensor between 0 and 1 while soft; one that needs
        gradients has the weight's dtype. A tensor on another device is moved for each use
    """
    linears = {name: linear(model, name) for name in masks}
    with forwards(
        {linears[name]: partial(_forward, linears[name], masks[name]) for name in masks}
    ):
        yield


@contextmanager
def forwards(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other forwards for some modules while the context lasts, then those they had."""
    previous: dict[nn.Module, Callable[..., Any] | None]
    previous = {module: module.__dict__.get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in previous.items():
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def linear(model: nn.Module, name: str) -> nn.Module:
    """
    The Linear or Conv1D of that name.

    :raises ValueError: if the module is something else
    """
    module = model.get_submodule(name)
    if not is_linear(module):
        raise ValueError(f"{name} is a {type(module).__name__}, not a Linear")
    return module


def _forward(module: nn.Module, mask: Mask, x: Tensor) -> Tensor:
    weight, bias = weight_of(module), bias_of(module)
    if not isinstance(mask, Tensor):
        return mask(x, weight, bias)
    out: Tensor = MaskedLinear.apply(x, weight, bias, mask.to(weight.device))
    return out
