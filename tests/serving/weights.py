# SPDX-License-Identifier: Apache-2.0
"""Random 2:4 weights and tokens, and the float64 product of them."""

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.kernel import NARROW, Product

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
BOUND = 0.008  # of the largest output: bfloat16 rounds twice, float8 sums have 14 bits


def sparse_weight(
    rows: int, channels: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> Tensor:
    """
    A 2:4 weight [rows, channels]; the first rows hold groups with fewer than two weights.
    """
    generator = torch.Generator(device).manual_seed(seed)
    size = (rows, channels // 4, 4)
    order = torch.rand(size, generator=generator, device=device).argsort(-1)
    weight = torch.randn(size, generator=generator, device=device)
    weight = weight.masked_fill(order < 2, 0)
    weight[: rows // 8] = weight[: rows // 8].masked_fill(order[: rows // 8] < 3, 0)
    weight[0] = 0
    weight = weight.view(rows, channels)
    return (
        (weight * 40).round().clamp(-127, 127).to(dtype)
        if dtype in NARROW
        else (weight.to(dtype))
    )


def product_of(
    weight: Tensor,
    tokens: int,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    per_token: bool = True,
    per_channel: bool = True,
    bias: bool = False,
    seed: int = 1,
) -> Product:
    """Random tokens for a weight; with scales where it is of 8 bits."""
    device = weight.device
    generator = torch.Generator(device).manual_seed(seed)
    rows, channels = weight.shape
    x = torch.randn(tokens, channels, generator=generator, device=device)
    if weight.dtype not in NARROW:
        return Product(x.to(weight.dtype), rows, weight.dtype)
    x = (x * 30).round().clamp(-127, 127).to(weight.dtype)
    rand = [
        torch.rand(size, generator=generator, device=device) + 0.1
        for size in (
            (tokens, 1) if per_token else (1,),
            (rows, 1) if per_channel else (1,),
        )
    ]
    shift = torch.randn(rows, generator=generator, device=device).to(out_dtype)
    scale_w = rand[1] / 1000
    return Product(x, rows, out_dtype, rand[0], scale_w, shift if bias else None)


def exact(weight: Tensor, product: Product) -> Tensor:
    """The product in float64."""
    out = product.x.double() @ weight.double().t()
    if product.scale_x is not None and product.scale_w is not None:
        out = out * product.scale_x.double() * product.scale_w.double().reshape(1, -1)
    return out if product.bias is None else out + product.bias.double()


def error(out: Tensor, expected: Tensor) -> float:
    """The largest error as a share of the largest output."""
    difference = (out.double() - expected).abs().max()
    return float(difference / expected.abs().max())
