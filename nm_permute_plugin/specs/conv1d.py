# SPDX-License-Identifier: Apache-2.0
"""Linears whichever way they store their weight: GPT-2's Conv1D has it as [in, out]."""

from typing import cast

from jaxtyping import Shaped
from torch import Tensor, nn

CONV1D = "Conv1D"
"""The class of transformers, known by name: specs need no transformers."""


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a Conv1D, whose weight is [in, out]."""
    return any(kind.__name__ == CONV1D for kind in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix: a Linear, or a Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def input_axis(module: nn.Module) -> int:
    """The axis of the stored weight that holds the input channels."""
    return 0 if is_transposed(module) else -1


def weight_of(module: nn.Module) -> Shaped[Tensor, "_out _in"]:
    """The weight of a linear as [out, in], a view of what is stored, without gradients."""
    return as_stored(module, cast(Tensor, module.weight).detach())


def bias_of(module: nn.Module) -> Shaped[Tensor, " _out"] | None:
    """The bias of a linear, without gradients, if it has one."""
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def as_stored(
    module: nn.Module, weight: Shaped[Tensor, "_rows _columns"]
) -> Shaped[Tensor, "_rows2 _columns2"]:
    """A weight [out, in] the way a linear stores it, and the other way round."""
    return weight.t() if is_transposed(module) else weight
