# SPDX-License-Identifier: Apache-2.0
"""Multiplies a layer's input by its 2:4 weight: in 16 bits, or in 8 bits with scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from nm_permute_plugin.serving.kernels.scaling import narrowest
from nm_permute_plugin.serving.linear import SparseLinear
from nm_permute_plugin.serving.vllm_names import (
    CompressedTensorsLinearMethod,
    CompressedTensorsW8A8Fp8,
    CompressedTensorsW8A8Int8,
    GroupShape,
    LinearBase,
    LinearMethodBase,
    QuantFP8,
    UnquantizedLinearMethod,
    ops,
)

Quantize = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Maps x and its static scale, None for one per token, to x in 8 bits and the scale."""

_SMALLEST = 1e-30
"""Floor of a token's largest value, so that all-zero tokens do not divide by zero."""


def unsupported_precision(layer: LinearBase, stock: LinearMethodBase) -> str | None:
    """Return why a layer's precision has no sparse product; None if it has one."""
    if type(stock) is UnquantizedLinearMethod:
        return None
    if type(stock) is not CompressedTensorsLinearMethod:
        return f"{type(stock).__name__} has no sparse product"
    scheme = layer.scheme
    if isinstance(scheme, CompressedTensorsW8A8Fp8):
        if scheme.strategy in ("tensor", "channel"):
            return None
        return "8-bit floats with scales by block have no sparse product"
    if isinstance(scheme, CompressedTensorsW8A8Int8):
        if scheme.input_symmetric:
            return None
        return "8-bit integers with a zero point have no sparse product"
    return f"{type(scheme).__name__} has no sparse product"


def product_of(linear: SparseLinear, layer: LinearBase) -> Product:
    """
    Make the product of a layer, and bring the layer's scales into the shape it needs.

    :param layer: a loaded layer, of a precision that has a sparse product
    """
    scheme = getattr(layer, "scheme", None)
    if scheme is None:
        return FloatProduct(linear)
    scale = layer.weight_scale.data
    if scale.numel() == len(layer.logical_widths) > 1:
        widths = torch.tensor(layer.logical_widths, device=scale.device)
        scale = scale.flatten().repeat_interleave(widths)
    layer.weight_scale = _constant(narrowest(scale.reshape(-1, 1)))
    static = scheme.is_static_input_scheme
    layer.input_scale = _constant(layer.input_scale.data.max()) if static else None
    is_fp8 = isinstance(scheme, CompressedTensorsW8A8Fp8)
    return ScaledProduct(linear, fp8_quantizer(static) if is_fp8 else quantize_int8)


class Product(Protocol):
    """Computes a layer's output from the layer, its input and its bias."""

    linear: SparseLinear

    def __call__(self, layer: LinearBase, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] -> [..., out]."""


class FloatProduct:
    """Multiplies in 16 bits."""

    def __init__(self, linear: SparseLinear) -> None:
        self.linear = linear

    def __call__(self, layer: LinearBase, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] -> [..., out]."""
        out = self.linear(x.reshape(-1, x.shape[-1]))
        if bias is not None:
            out = out + bias
        return out.view(*x.shape[:-1], out.shape[-1])


class ScaledProduct:
    """Multiplies in 8 bits; activations are quantized as vLLM's own method does."""

    def __init__(self, linear: SparseLinear, quantize: Quantize) -> None:
        self.linear = linear
        self.quantize = quantize

    def __call__(self, layer: LinearBase, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] -> [..., out]."""
        if isinstance(x, Tensor):
            shape, dtype = x.shape, x.dtype
            tokens = x.reshape(-1, shape[-1])
            quantized, scale = self.quantize(tokens, layer.input_scale)
        else:  # newer vLLMs fuse the quantization into the operation before the layer
            shape, dtype = x.orig_shape, x.orig_dtype
            quantized, scale = x.data.reshape(-1, shape[-1]), x.scale
        out = self.linear.scaled_mm(
            quantized, scale.reshape(-1, 1), layer.weight_scale, bias, dtype
        )
        return out.view(*shape[:-1], out.shape[-1])


def fp8_quantizer(static: bool) -> Quantize:
    """
    Make vLLM's own quantization, which it fuses into the operation before the layer.

    :param static: True if the scale is given, one number; else each token gets its own
    """
    shape = GroupShape.PER_TENSOR if static else GroupShape.PER_TOKEN
    quantize: Quantize = QuantFP8(static=static, group_shape=shape)
    return quantize


def quantize_int8(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """
    Quantize as vLLM's operator does; compiled, it fuses into the operation before it.

    :param x: [tokens, in]
    :param scale: one number; None for each token's largest magnitude over 127
    :return: int8 [tokens, in], and the scale
    """
    if not torch.compiler.is_compiling():
        quantized, found, _ = ops.scaled_int8_quant(x.contiguous(), scale)
        return quantized, found
    x = x.float()
    if scale is None:
        largest = x.abs().amax(-1, keepdim=True)
        scale, inverse = largest / 127, 127 / largest.clamp_min(_SMALLEST)
    else:
        inverse = 1 / scale
    return (x * inverse).round().clamp(-128, 127).to(torch.int8), scale


def _constant(tensor: Tensor) -> Parameter:
    return Parameter(tensor, requires_grad=False)
