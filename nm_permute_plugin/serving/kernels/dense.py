# SPDX-License-Identifier: Apache-2.0
"""The dense product: what every sparse one must beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.kernel import (
    NARROW,
    WIDE,
    Product,
    Settings,
    padded,
    unknown,
)
from nm_permute_plugin.serving.kernels.scaling import scaled


@dataclass(frozen=True)
class Dense:
    """cuBLAS, with zeros multiplied like any other weight."""

    name: str = "dense"

    def refusal(self, weight: Tensor) -> str | None:
        return unknown(weight.dtype, WIDE + NARROW)

    def prepare(self, weight: Tensor) -> Tensor:
        return weight

    def candidates(self, form: Tensor, product: Product) -> list[Settings]:
        return [()]

    def run(self, form: Tensor, product: Product, settings: Settings) -> Tensor:
        x = product.x
        if form.dtype in WIDE:
            return torch.nn.functional.linear(x, form)
        scale_x, scale_w = product.scales
        if form.dtype == torch.int8:
            raw = torch._int_mm(padded(x, 32), form.t())[: len(x)]
            return scaled(raw, scale_x, scale_w, product.bias, product.out_dtype)
        if scale_x.numel() > 1 or scale_w.numel() > 1:
            scale_x = scale_x.reshape(-1, 1).expand(len(x), 1).contiguous()
            scale_w = scale_w.reshape(1, -1).expand(1, len(form)).contiguous()
            # row-wise scales come with bfloat16 only
            bias = None if product.bias is None else product.bias.bfloat16()
            out = torch._scaled_mm(
                x, form.t(), scale_x, scale_w, bias, out_dtype=torch.bfloat16
            )
            return out.to(product.out_dtype)
        return torch._scaled_mm(
            x, form.t(), scale_x, scale_w, product.bias, out_dtype=product.out_dtype
        )
