# SPDX-License-Identifier: Apache-2.0
"""Weights as they will be served after a quantization, with gradients straight through."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]
"""Rounds a weight [out, in] as it will be served, in the same dtype; what is 0 stays 0."""


def straight_through(
    weight: Float[Tensor, "out in"], served: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """
    The served values in the forward pass; their gradient goes to the weight as it is.

    :param weight: what is trained, of any floating dtype
    :param served: the weight as it is rounded at the moment
    """
    through: Tensor = _StraightThrough.apply(weight, served)
    return through


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, served: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return served.view_as(served)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None
