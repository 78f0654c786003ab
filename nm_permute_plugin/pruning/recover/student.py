# SPDX-License-Identifier: Apache-2.0
"""The sparse student: new values of the weights that masks keep, beside the dense model."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nm_permute_plugin.pruning.recover.rounding import Rounding, straight_through
from nm_permute_plugin.pruning.running.masked import Mask, linear
from nm_permute_plugin.specs.conv1d import as_stored, bias_of, weight_of
from nm_permute_plugin.specs.fold import Write

Values = dict[str, Tensor]
"""Weights [out, in] and biases of linears, by the name of the parameter."""


class Student:
    """
    New values of what N:M masks keep, and of biases, for the linears of a dense model.

    The model's own parameters stay dense until ``write``: run plainly it is the teacher,
    under ``masks()`` the student.

    :param masks: by linear, True where a weight is kept
    :param roundings: by linear, how its weight will be served; the student runs with
        rounded weights, and its values stay as they are
    :ivar values: in the model's dtype; exactly 0 where a mask drops
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Bool[Tensor, "_out _in"]],
        roundings: Mapping[str, Rounding] | None = None,
    ) -> None:
        self.model = model
        known = roundings or {}
        self._roundings = {f"{x}.weight": known[x] for x in masks if x in known}
        self._dropped = {name: ~mask for name, mask in masks.items()}
        self.values: Values = {}
        for name, dropped in self._dropped.items():
            module = linear(model, name)
            self.values[f"{name}.weight"] = weight_of(module).masked_fill(dropped, 0)
            bias = bias_of(module)
            if bias is not None:
                self.values[f"{name}.bias"] = bias.clone()

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the pruned linears."""
        return tuple(self._dropped)

    @property
    def is_rounded(self) -> bool:
        """Whether it runs with rounded weights."""
        return bool(self._roundings)

    def masks(
        self,
        overrides: Mapping[str, Tensor] | None = None,
        served: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Mask]:
        """
        What makes the linears multiply by the student's values, for ``masked``.

        :param overrides: values that replace ``values``, of any floating dtype; what a mask
            drops counts as 0 and gets no gradient
        :param served: the rounded values, of ``served``; by default they are rounded here
        """
        values = {**self.values, **(overrides or {})}
        if served is None:
            served = self.served(values)
        return {
            name: partial(
                _forward,
                values[f"{name}.weight"],
                served.get(f"{name}.weight"),
                values.get(f"{name}.bias"),
                dropped,
            )
            for name, dropped in self._dropped.items()
        }

    @torch.no_grad()
    def served(
        self, values: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None
    ) -> Values:
        """
        Weights as they will be served, in the model's dtype; those that are not rounded
        have none.

        :param into: earlier ones, which are overwritten and stay where they are in memory
        """
        found: Values = {}
        for name, rounding in self._roundings.items():
            value = rounding(self.rounded({name: values[name]})[name])
            found[name] = value if into is None else into[name].copy_(value)
        return found

    def masters(self, linears: Iterable[str]) -> Values:
        """Float32 copies of the linears' values, to be trained."""
        return {
            name: self.values[name].float().clone().requires_grad_(True)
            for owner in linears
            for name in (f"{owner}.weight", f"{owner}.bias")
            if name in self.values
        }

    def rounded(self, masters: Mapping[str, Tensor]) -> Values:
        """Trained values as they are stored: in the model's dtype, 0 where dropped."""
        rounded = {}
        for name, master in masters.items():
            value = master.detach().to(self.values[name].dtype)
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight":
                value = value.masked_fill(self._dropped[owner], 0)
            rounded[name] = value
        return rounded

    @torch.no_grad()
    def write(self, write: Write) -> None:
        """Store the values in the model, which is pruned from then on."""
        for name, value in self.values.items():
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if leaf == "weight":
                value = as_stored(module, value).contiguous()
            write(module, leaf, value)


def _forward(
    weight: Float[Tensor, "_out _in"],
    served: Float[Tensor, "_out _in"] | None,
    bias: Float[Tensor, " _out"] | None,
    dropped: Bool[Tensor, "_out _in"],
    x: Tensor,
) -> Tensor:
    if served is not None:
        weight = straight_through(weight, served)
    kept = weight.masked_fill(dropped, 0).to(x.dtype)
    return F.linear(x, kept, None if bias is None else bias.to(x.dtype))
