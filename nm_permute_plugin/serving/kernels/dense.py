# SPDX-License-Identifier: Apache-2.0
"""The dense product: what every sparse one must beat."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.kernel import (
    NARROW,
    WIDE,
    Settings,
    padded,
    sums_dtype,
    unknown,
)


@dataclass(frozen=True)
class Dense:
    """cuBLAS, with zeros multiplied like any other weight."""

    name: str = "dense"

    def refusal(self, weight: Tensor) -> str | None:
        return unknown(weight.dtype, WIDE + NARROW)

    def prepare(self, weight: Tensor) -> Tensor:
        _one(weight.device)  # not while a CUDA graph is captured, which would own it
        return weight

    def candidates(self, form: Tensor, x: Tensor, rows: int) -> list[Settings]:
        return [()]

    def run(self, form: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        if form.dtype in WIDE:
            return torch.nn.functional.linear(x, form)
        if form.dtype == torch.int8:
            sums = torch._int_mm(padded(x, 32), form.t())[: len(x)]
            return sums.to(sums_dtype(x.dtype))
        one = _one(x.device)
        return torch._scaled_mm(
            x,
            form.t(),
            *(one, one),
            out_dtype=sums_dtype(x.dtype),
            use_fast_accum=True,
        )


@cache
def _one(device: torch.device) -> Tensor:
    """The scale of a product that is not scaled."""
    return torch.ones((), dtype=torch.float32, device=device)
