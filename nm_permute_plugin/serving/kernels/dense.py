# SPDX-License-Identifier: Apache-2.0
"""The dense product, which every sparse kernel must beat."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.kernel import (
    DTYPES_8,
    DTYPES_16,
    Settings,
    output_dtype,
    padded,
    unsupported_dtype,
)


@dataclass(frozen=True)
class Dense:
    """cuBLAS, which multiplies by the zeros too."""

    name: str = "dense"

    def unsupported(self, weight: Tensor) -> str | None:
        return unsupported_dtype(weight.dtype, DTYPES_16 + DTYPES_8)

    def prepare(self, weight: Tensor) -> Tensor:
        # Made now: a CUDA graph would own what its capture allocates. Filled anew: an
        # engine that has slept (level 2) loads its weights into memory that was lost.
        _one(weight.device).fill_(1)
        return weight

    def unpack(
        self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        return packed

    def candidates(self, packed: Tensor, x: Tensor, rows: int) -> list[Settings]:
        return [()]

    def takes(self, weight: Tensor, tokens: int, settings: Settings) -> bool:
        return settings == ()

    def run(self, packed: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        if packed.dtype in DTYPES_16:
            return torch.nn.functional.linear(x, packed)
        if packed.dtype == torch.int8:
            sums = torch._int_mm(padded(x, 32), packed.t())[: len(x)]
            return sums.to(output_dtype(x.dtype))
        one, out_dtype = _one(x.device), output_dtype(x.dtype)
        return torch._scaled_mm(
            x, packed.t(), one, one, out_dtype=out_dtype, use_fast_accum=True
        )


@cache
def _one(device: torch.device) -> Tensor:
    """Return the scale 1, for an unscaled product."""
    return torch.ones((), dtype=torch.float32, device=device)
