# SPDX-License-Identifier: Apache-2.0
"""
Run a model with masked weights; backward gives the mask its gradient, not the weights.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from nm_permute_plugin.specs.conv1d import bias_of, is_linear, weight_of


@runtime_checkable
class LearnedMask(Protocol):
    """
    A mask that is made from parameters, each time it is needed.

    Backward turns the large gradient of the mask into those of the parameters at once: no
    two gradients of the size of a weight live at the same time.
    """

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What the mask is made from, and what learns."""
        ...

    def kept(self) -> Bool[Tensor, "out in"]:
        """True where a weight is kept."""
        ...

    def gradients(self, of_mask: Float[Tensor, "out in"]) -> tuple[Tensor, ...]:
        """The gradients of the parameters, given that of the mask."""
        ...


@runtime_checkable
class BoundMask(Protocol):
    """A mask that is made from the weight that it masks."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What learns; of the moment when the linear runs."""
        ...

    def bound(self, weight: Float[Tensor, "out in"]) -> LearnedMask:
        """The mask, which is not kept between forward and backward."""
        ...


Mask = Tensor | LearnedMask | BoundMask | Callable[[Tensor], Tensor]
"""A tensor, 1 or True where a weight is kept, [out, in]; a learned mask; or a function
of the input that gives the whole output of the linear."""


@contextmanager
def masked(model: nn.Module, masks: Mapping[str, Mask]) -> Iterator[None]:
    """
    Let the named linears multiply by their masks while the context lasts.

    :param masks: by module name. A tensor that needs gradients has the weight's dtype;
        one on another device is moved for each use
    :raises ValueError: if a name is no linear's
    """
    linears = {linear(model, name): mask for name, mask in masks.items()}
    with forwards({m: partial(_forward, m, mask) for m, mask in linears.items()}):
        yield


@contextmanager
def forwards(replaced: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give some modules another forward while the context lasts, then their own again."""
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


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of the model have a gradient while the context lasts."""
    # What lies in shards is frozen, or learned, from the start.
    trained = [
        p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)
    ]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the model without dropout, and give every module its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def linear(model: nn.Module, name: str) -> nn.Module:
    """
    The Linear or Conv1D of that name.

    :raises ValueError: if the module is something else
    """
    module = model.get_submodule(name)
    if not is_linear(module):
        raise ValueError(f"{name} is a {type(module).__name__}, not a Linear")
    return module


class _MaskedLinear(torch.autograd.Function):
    """
    ``x (W * mask)^T + b``. The masked weight is made anew in backward, never stored.

    The gradient of the mask is the gradient of the masked weight times ``W``: to first
    order, what the loss loses when the mask opens by one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: "_TensorMask | LearnedMask | BoundMask",
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mask = mask
        return F.linear(x, _times(weight, _bound(mask, weight).kept()), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        mask = _bound(ctx.mask, weight)
        grad_x = None
        learned: tuple[Tensor | None, ...] = (None,) * (len(ctx.needs_input_grad) - 4)
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _times(weight, mask.kept())
        if any(ctx.needs_input_grad[4:]):
            of_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
            learned = mask.gradients(of_weight.mul_(weight))
        return grad_x, None, None, None, *learned


def _times(weight: Tensor, mask: Tensor) -> Tensor:
    """The product; a CPU multiplies by numbers of a byte far faster than by booleans."""
    return weight * (mask.view(torch.uint8) if mask.dtype == torch.bool else mask)


def _bound(
    mask: "_TensorMask | LearnedMask | BoundMask", weight: Tensor
) -> "_TensorMask | LearnedMask":
    return mask.bound(weight) if isinstance(mask, BoundMask) else mask


class _TensorMask:
    """A mask that is a tensor, perhaps between 0 and 1."""

    def __init__(self, mask: Tensor) -> None:
        self.parameters = (mask,)

    def kept(self) -> Tensor:
        return self.parameters[0].detach()

    def gradients(self, of_mask: Tensor) -> tuple[Tensor, ...]:
        return (of_mask,)


def _forward(module: nn.Module, mask: Mask, x: Tensor) -> Tensor:
    if isinstance(mask, Tensor):
        mask = _TensorMask(mask.to(weight_of(module).device))
    elif not isinstance(mask, LearnedMask | BoundMask):
        return mask(x)
    out: Tensor = _MaskedLinear.apply(
        x, weight_of(module), bias_of(module), mask, *mask.parameters
    )
    return out
