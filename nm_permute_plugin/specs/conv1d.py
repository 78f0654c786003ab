# SPDX-License-Identifier: Apache-2.0
"""Linears are read alike, whichever way they store their weight: Conv1D has [in, out]."""

from typing import cast

from jaxtyping import Shaped
from torch import Tensor, nn

CONV1D = "Conv1D"
"""GPT-2's class in transformers, known by its name: ``specs`` does not import it."""


def is_transposed(module: nn.Module) -> bool:
    """Say whether a module is a Conv1D, whose weight is [in, out]."""
    return any(kind.__name__ == CONV1D for kind in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Say whether a module multiplies by a matrix: a Linear, or a Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def input_axis(module: nn.Module) -> int:
    """Return the axis of the stored weight that holds the input channels."""
    return 0 if is_transposed(module) else -1


def weight_of(module: nn.Module) -> Shaped[Tensor, "_out _in"]:
    """Return a linear's weight as [out, in]: a view of what it stores, no gradients."""
    return as_stored(module, cast(Tensor, module.weight).detach())


def bias_of(module: nn.Module) -> Shaped[Tensor, " _out"] | None:
    """Return a linear's bias without gradients, or None if it has none."""
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def as_stored(
    module: nn.Module, weight: Shaped[Tensor, "_rows _columns"]
) -> Shaped[Tensor, "_rows2 _columns2"]:
    """Turn a weight [out, in] into what a linear stores, or the other way round."""
    return weight.t() if is_transposed(module) else weight
