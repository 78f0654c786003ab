# SPDX-License-Identifier: Apache-2.0
"""Random 2:4 weights and tokens, and the float64 products of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.kernel import DTYPES_8

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
        if dtype in DTYPES_8
        else (weight.to(dtype))
    )


class Scales(NamedTuple):
    """What ``scaled_mm`` takes beside tokens, in its order."""

    scale_x: Tensor
    scale_w: Tensor
    bias: Tensor | None
    out_dtype: torch.dtype


def scales_for(
    weight: Tensor,
    tokens: int,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    per_token: bool = True,
    per_channel: bool = True,
    bias: bool = False,
) -> Scales:
    """Random scales for a weight of 8 bits."""
    generator = torch.Generator(weight.device).manual_seed(2)
    rows = len(weight)
    scale_x, scale_w = (
        torch.rand(size, generator=generator, device=weight.device) + 0.1
        for size in (
            (tokens, 1) if per_token else (1,),
            (rows, 1) if per_channel else (1,),
        )
    )
    shift = torch.randn(rows, generator=generator, device=weight.device)
    return Scales(
        scale_x, scale_w / 1000, shift.to(out_dtype) if bias else None, out_dtype
    )


def exact(weight: Tensor, x: Tensor, scales: Scales | None = None) -> Tensor:
    """The product in float64, scaled if asked for."""
    out = x.double() @ weight.double().t()
    if scales is None:
        return out
    out = out * scales.scale_x.double() * scales.scale_w.double().reshape(1, -1)
    return out if scales.bias is None else out + scales.bias.double()


def error(out: Tensor, expected: Tensor) -> float:
    """The largest error as a share of the largest output."""
    difference = (out.double() - expected).abs().max()
    return float(difference / expected.abs().max())


def expert_weights(
    experts: int, hidden: int, inner: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """2:4 weights of experts: [experts, 2 * inner, hidden], [experts, hidden, inner]."""
    up, down = (
        torch.stack(
            [sparse_weight(*shape, dtype, seed, device) for seed in range(experts)]
        )
        for shape in ((2 * inner, hidden), (hidden, inner))
    )
    return up * hidden**-0.5, down * inner**-0.5


def exact_experts(
    up: Tensor, down: Tensor, x: Tensor, weights: Tensor, ids: Tensor
) -> Tensor:
    """The weighted sum of each token's experts in float64; ids below zero are none."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            if expert < 0:
                continue
            gate, value = (up[expert].double() @ x[token].double()).chunk(2)
            inner = torch.nn.functional.silu(gate) * value
            out[token] += weight.double() * (down[expert].double() @ inner)
    return out
