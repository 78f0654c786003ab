# SPDX-License-Identifier: Apache-2.0
"""A linear of a transformers model whose 2:4 weight is packed for the sparse kernels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import ref

import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn import Parameter

from nm_permute_plugin.serving.kernels.kernel import DTYPES_16
from nm_permute_plugin.serving.kernels.scaling import scaled
from nm_permute_plugin.serving.linear import SparseLinear
from nm_permute_plugin.serving.ops import TABLES, multiply, sparse24_linear, unpack
from nm_permute_plugin.serving.quantized_linear import give_back, quantize, take_over

UNDO = "nmp.accelerate(model, undo=True)"


@dataclass
class Host:
    """
    What the accelerated linears of a model share.

    :param owner: the model that compressed-tensors decompresses at its first forward
    :param told: whether the log says that some are dense again
    """

    owner: "ref[nn.Module] | None" = None
    told: bool = False


class AcceleratedLinear(nn.Linear):
    """
    A linear layer that multiplies by packed copies of its weight, and holds no other.

    ``pack_linear`` makes one of a linear in place. It runs forward only. A state dict of
    it has the dense weight, which is unpacked for that. Whoever reads the attribute
    ``weight``, loads another one, or moves the layer to another device or dtype gets an
    ordinary linear again, and the log says so once a model.
    """

    is_accelerated = True
    table_name: str
    kernels: list[str]
    packed_names: tuple[str, ...]
    emptied: Parameter
    dtype: torch.dtype
    taken: dict[str, Any]
    host: Host

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if x.requires_grad and torch.is_grad_enabled():
            out: Tensor = _ForwardOnly.apply(x, self)
        else:
            out = self.product(x)
        return out if self.bias is None else out + self.bias

    def product(self, x: Tensor) -> Tensor:
        """Multiply by the weight: x [..., in] -> [..., out], without the bias."""
        # A graph holds the operator; without one its dispatch would only take time.
        call = sparse24_linear if torch.compiler.is_compiling() else multiply
        packed = [getattr(self, name) for name in self.packed_names]
        tokens = x.reshape(-1, self.in_features)
        out: Tensor
        if self.dtype in DTYPES_16:
            out = call(tokens, packed, self.table_name)
        else:
            given = self._parameters.get("input_scale")
            quantized, scale = quantize(tokens, self.dtype, given)
            sums = call(quantized, packed, self.table_name)
            weights = cast(Tensor, self.weight_scale).reshape(-1, 1)
            if weights.dtype == torch.float16:
                weights = weights.float()
            out = scaled(sums, scale, weights, None, x.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        """Unpack the weight: [out, in], with the bits that it had."""
        packed = [getattr(self, name) for name in self.packed_names]
        shape = (self.out_features, self.in_features)
        return unpack(packed, self.kernels, shape, self.dtype)

    def restore(self, why: str | None = None) -> Any:
        """
        Become an ordinary linear again, with the parameter that it had.

        :param why: what asked for the dense weight, for the log; None if the owner did
        """
        if why is not None and not self.host.told:
            self.host.told = True
            logger.warning(
                f"a linear of the accelerated model is dense again, because {why}; others "
                "may follow. Call nmp.accelerate(model) again to pack them."
            )
        weight = self.emptied
        weight.data = self.dense()
        for name in self.packed_names:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        taken, owner = self.taken, self.host.owner
        for name in _ATTRIBUTES:
            del self.__dict__[name]
        others = dict(self._parameters)
        self._parameters.clear()
        self._parameters.update({"weight": weight, **others})  # in the usual order
        self.__class__ = nn.Linear  # type: ignore[assignment]
        give_back(self, taken, None if owner is None else owner())
        return self

    @property
    def weight(self) -> Parameter:  # type: ignore[override]
        """The dense weight, for whoever reads or changes it: the layer is dense again."""
        weight: Parameter = self.restore("its weight was asked for")._parameters[
            "weight"
        ]
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        packed = self._buffers[self.packed_names[0]]
        assert packed is not None
        moved = fn(packed.new_empty(0, dtype=self.dtype))
        if moved.dtype == self.dtype and moved.device == packed.device:
            return cast(nn.Module, super()._apply(fn, recurse))
        why = f"it was moved to {moved.device} as {moved.dtype}"
        return cast(nn.Module, self.restore(why)._apply(fn, recurse))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.table_name not in TABLES:
            self.restore("it was pickled by another process")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}weight"] = self.dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any
    ) -> None:
        layer = self.restore("weights were loaded into it")
        layer._load_from_state_dict(state_dict, prefix, *rest)


_ATTRIBUTES = (
    *("table_name", "kernels", "packed_names", "emptied", "dtype"),
    *("taken", "host"),
)


def pack_linear(linear: nn.Linear, sparse: SparseLinear, host: Host) -> None:
    """
    Let a linear multiply by its packed weight, in place; the dense weight is freed.

    :param sparse: the weight of the linear
    :param host: is shared by all layers of a model
    """
    weight = linear.weight
    del linear._parameters["weight"]
    names = tuple(f"packed_{index}" for index in range(len(sparse.packed)))
    for name, packed in zip(names, sparse.packed, strict=True):
        linear.register_buffer(name, packed.detach(), persistent=False)
    # not by attribute: a module would take the parameter for one of its own
    linear.__dict__.update(
        table_name=sparse.table_name,
        kernels=sparse.kernels,
        packed_names=names,
        emptied=weight,
        dtype=weight.dtype,
        taken=take_over(linear),
        host=host,
    )
    weight.data = weight.data.new_empty(0)
    linear.__class__ = AcceleratedLinear


class _ForwardOnly(torch.autograd.Function):
    """The product where a gradient is wanted: it says that there is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: AcceleratedLinear) -> Tensor:
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            f"an accelerated model runs forward only: {UNDO} before it is trained"
        )
