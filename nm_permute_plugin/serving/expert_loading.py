# SPDX-License-Identifier: Apache-2.0
"""Parameters for routed experts as a checkpoint stores them, all of a layer's stacked."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from nm_permute_plugin.checkpoint.codec import decompress
from nm_permute_plugin.checkpoint.layout24 import FIRST_TWO
from nm_permute_plugin.serving.kernels.experts import PackedExperts, pack_experts
from nm_permute_plugin.serving.method import STORED_TENSORS

Load = Callable[..., bool | None]
"""Copies a tensor of one expert, cut for this device, into a parameter of all experts."""

REMEDY = (
    "write the checkpoint again: nm-permute convert DIR OUT --dense-experts, or "
    "--format dense"
)
"""What to do about experts that cannot be served as they are stored."""


class Stack(NamedTuple):
    """
    A weight of all experts of a device, as vLLM stacks it.

    :param name: vLLM's name for it, as ``w13`` in ``w13_weight``
    :param shape: [experts, out, in], padded as vLLM wants it
    :param parts: the checkpoint's names of what it is stacked of, one above the other
    :param rows: of each part, without padding
    :param columns: input channels without padding
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    rows: int
    columns: int

    def add_to(self, layer: Module, like: Tensor, loader: Load) -> None:
        """
        Add parameters for the stored tensors to a layer.

        :param like: has the weight's dtype and device
        :param loader: vLLM's, which knows how a dense expert is cut
        """
        count, rows = self.shape[0], self.rows * len(self.parts)
        bytes_a_row = -(-self.columns // 8)
        of = {
            "compressed": like.new_empty(count, rows, self.columns // 2),
            # zeros are no valid bitmask: experts missing in the checkpoint are noticed
            "bitmask": like.new_zeros(count, rows, bytes_a_row, dtype=torch.uint8),
            "shape": like.new_zeros(count, len(self.parts), 2, dtype=torch.int64),
        }
        for part, tensor in of.items():
            parameter = Parameter(tensor, requires_grad=False)
            load = _shape_loader(loader) if part == "shape" else _loader(loader)
            parameter.weight_loader = load  # type: ignore[attr-defined]
            layer.register_parameter(f"{self.name}_{part}", parameter)

    def stored(self, layer: Module) -> tuple[Tensor, Tensor]:
        """Return values and bitmask as a layer holds them."""
        values, bits = (getattr(layer, f"{self.name}_{x}") for x in STORED_TENSORS[:2])
        return values.data, bits.data

    def make_two_of_four(self, layer: Module) -> None:
        """Give the random weights of ``--load-format dummy`` the pattern they stand for."""
        bits = self.stored(layer)[1].fill_(FIRST_TWO)
        if self.columns % 8:
            bits[..., -1] &= 0x0F

    def pack(self, layer: Module, name: str) -> PackedExperts:
        """
        Return the weights that a layer holds as stored, packed for our kernel.

        :param name: the layer's name
        :raises ValueError: if an expert is damaged or missing
        """
        count = self.shape[0]
        return pack_experts(self._expert(layer, name, i) for i in range(count))

    def packed(self, layer: Module, dtype: torch.dtype) -> PackedExperts:
        """Return the packed weights that a layer holds since ``keep``."""
        return PackedExperts(getattr(layer, f"{self.name}_packed").data, dtype)

    def keep(self, layer: Module, weights: PackedExperts) -> None:
        """Replace a layer's stored tensors by packed weights."""
        parameter = Parameter(weights.packed, requires_grad=False)
        layer.register_parameter(f"{self.name}_packed", parameter)
        self._drop(layer)

    def expand(self, layer: Module, name: str) -> Tensor:
        """
        Return the dense weights [experts, out, in] that a layer holds as stored.

        :param name: the layer's name
        :raises ValueError: if an expert is damaged or missing
        """
        values, _ = self.stored(layer)
        weight: Tensor = values.new_zeros(self.shape)
        padded = weight.view(self.shape[0], len(self.parts), -1, self.shape[2])
        for expert in range(len(values)):
            dense = self._expert(layer, name, expert)
            padded[expert, :, : self.rows, : self.columns] = dense.view(
                len(self.parts), self.rows, self.columns
            )
        return weight

    def replace(self, layer: Module, name: str) -> None:
        """
        Replace a layer's stored tensors by the dense weight.

        :param name: the layer's name
        :raises ValueError: if an expert is damaged or missing
        """
        weight = Parameter(self.expand(layer, name), requires_grad=False)
        layer.register_parameter(f"{self.name}_weight", weight)
        self._drop(layer)

    def _expert(self, layer: Module, name: str, expert: int) -> Tensor:
        """Return the dense weight of an expert [out, in] without padding."""
        values, bits = self.stored(layer)
        parts = []
        for part, projection in enumerate(self.parts):
            rows = slice(part * self.rows, (part + 1) * self.rows)
            what = f"{name}: {projection} of expert {expert}"
            stored = values[expert, rows], bits[expert, rows]
            parts.append(decompress(*stored, (self.rows, self.columns), what))
        return torch.cat(parts)

    def _drop(self, layer: Module) -> None:
        """Free the stored tensors."""
        for part in STORED_TENSORS:
            delattr(layer, f"{self.name}_{part}")


def must_be_cuttable(name: str, inner: int, devices: int) -> None:
    """
    See that tensor parallelism cuts stored experts between whole bytes of their bitmasks.

    :param name: the layer's name
    :param inner: inner channels of an expert on each device
    :raises ValueError: if it does not
    """
    if inner % 8 and devices > 1:
        raise ValueError(
            f"{name}: the {inner * devices} inner channels of an expert over {devices} "
            f"devices are {inner} each; stored 2:4 experts can be cut at multiples of 8 "
            "only. Take another --tensor-parallel-size, or --enable-expert-parallel. "
            f"Or: {REMEDY}"
        )


def _loader(stock: Load) -> Load:
    """Have vLLM cut values or bitmasks of an expert: like a weight, along the same axes."""

    def load(
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        more = {"shard_id": shard_id, "expert_id": expert_id}
        return stock(
            param, loaded_weight, "weight", **more, return_success=return_success
        )

    return load


def _shape_loader(stock: Load) -> Load:
    """
    Have vLLM copy the stored shape of an expert's part, which nothing reads.

    vLLM counts the numbers that are copied into a layer that it loads again, and finishes
    the layer as soon as all of them have come.
    """

    def load(
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        column = Parameter(param.data[:, int(shard_id == "w3")], requires_grad=False)
        more = {"shard_id": shard_id, "expert_id": expert_id}
        shape = loaded_weight.flatten()
        return stock(
            column, shape, "weight_shape", **more, return_success=return_success
        )

    return load
