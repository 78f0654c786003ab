# SPDX-License-Identifier: Apache-2.0
"""Linears that compressed-tensors quantized to 8 bits, as transformers holds them."""

from typing import Any

import torch
from torch import Tensor, nn

from nm_permute_plugin.serving.kernels.kernel import DTYPES_8

_HOOK = "ct_decompress_hook"
"""By this attribute a model holds the hook that decompresses it at its first forward."""

_OF_HOST = ("forward", "quantization_scheme", "quantization_status")
"""The attributes by which compressed-tensors runs a linear, and decompresses it."""

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.5}
"""A token's largest magnitude over this is its scale, as compressed-tensors has it."""


def unsupported_scheme(linear: nn.Linear) -> str | None:
    """Return why a quantized linear has no sparse product; None if it has one."""
    scheme = linear.__dict__.get("quantization_scheme")
    if scheme is None:
        return "another forward than a linear's"
    weights, inputs = scheme.weights, scheme.input_activations
    if weights is None or weights.num_bits != 8 or inputs is None:
        return "another quantization than 8 bits of weights and inputs"
    if weights.strategy not in ("tensor", "channel"):
        return "8-bit weights with scales by group"
    if not (weights.symmetric and inputs.symmetric and inputs.num_bits == 8):
        return "8-bit weights or inputs with a zero point"
    if inputs.strategy != ("token" if inputs.dynamic else "tensor"):
        return f"8-bit inputs with a scale by {inputs.strategy}"
    if scheme.output_activations is not None:
        return "quantized outputs"
    weight = getattr(linear, "weight", None)
    if weight is None or weight.dtype not in DTYPES_8:
        return (
            "8-bit weights that a forward has decompressed; accelerate the model right "
            "after from_pretrained"
        )
    return None


def take_over(linear: nn.Linear) -> dict[str, Any]:
    """Take away what compressed-tensors runs a linear by; ``give_back`` returns it."""
    return {
        name: linear.__dict__.pop(name) for name in _OF_HOST if name in linear.__dict__
    }


def give_back(
    linear: nn.Linear, taken: dict[str, Any], owner: nn.Module | None
) -> None:
    """
    Let compressed-tensors run a linear again.

    :param owner: the model with the hook that decompresses it; if that has run meanwhile,
        the linear is decompressed now
    """
    linear.__dict__.update(taken)
    if "quantization_scheme" in taken and owner is not None and not _waits(owner):
        quantizer: Any = owner.__dict__["hf_quantizer"]
        quantizer.compressor.decompress_model(linear)


def owner_of(model: nn.Module) -> nn.Module | None:
    """Find the model, in a model, that is to be decompressed at its first forward."""
    return next(filter(_waits, model.modules()), None)


def quantize(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """
    Quantize inputs as compressed-tensors does, in their own dtype; a compiler fuses it.

    :param x: [tokens, in]
    :param dtype: float8_e4m3fn or int8
    :param scale: one number; None for a scale a token
    :return: of ``dtype``, [tokens, in], and the scale in float32, one or [tokens, 1]
    """
    if scale is None:
        scale = x.abs().amax(-1, keepdim=True) / _LARGEST[dtype]
        scale = scale.masked_fill(scale == 0, torch.finfo(x.dtype).eps)
    scale = scale.reshape(-1, 1)
    values = x / scale
    if dtype == torch.int8:
        values = values.round().clamp(-128, 127)
    else:
        values = values.clamp(-448, 448)
    return values.to(dtype), scale.float()


def _waits(model: nn.Module) -> bool:
    return _HOOK in model.__dict__
