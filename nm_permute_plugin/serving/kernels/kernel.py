# SPDX-License-Identifier: Apache-2.0
"""What every way to multiply by a 2:4 weight offers."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Settings = tuple[int, ...]
"""What a kernel was tuned to; what the numbers mean is the kernel's own business."""

WIDE = (torch.bfloat16, torch.float16)
NARROW = (torch.float8_e4m3fn, torch.int8)


@dataclass(frozen=True)
class Product:
    """
    One product to compute: ``x @ weight.T``, scaled where the weight is of 8 bits.

    :param x: [tokens, in], of the weight's dtype
    :param out_features: rows of the weight
    :param out_dtype: bfloat16 or float16
    :param scale_x: float32, one number or [tokens, 1]; None for 16-bit weights
    :param scale_w: float32, one number or [out, 1]; None for 16-bit weights
    :param bias: [out], of ``out_dtype``; only with scales
    """

    x: Tensor
    out_features: int
    out_dtype: torch.dtype
    scale_x: Tensor | None = None
    scale_w: Tensor | None = None
    bias: Tensor | None = None

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """
        Both scales.

        :raises ValueError: if one is missing, or is not float32, as kernels read it
        """
        if self.scale_x is None or self.scale_w is None:
            raise ValueError(
                f"a product of {self.x.dtype} needs scale_x and scale_w; call scaled_mm"
            )
        for name, scale in (("scale_x", self.scale_x), ("scale_w", self.scale_w)):
            if scale.dtype != torch.float32:
                raise ValueError(f"{name} is {scale.dtype}; kernels read float32")
        return self.scale_x, self.scale_w

    def split(self, tokens: int) -> list["Product"]:
        """The products of so many tokens each, the last one of those that are left."""
        scales = (
            repeat(self.scale_x)
            if self.scale_x is None or self.scale_x.numel() == 1
            else self.scale_x.split(tokens)
        )
        parts = zip(self.x.split(tokens), scales, strict=False)
        return [replace(self, x=x, scale_x=scale_x) for x, scale_x in parts]


@runtime_checkable
class Kernel(Protocol):
    """A way to multiply; stateless, so that one object serves all layers."""

    @property
    def name(self) -> str:
        """What plans, tables and the environment call it."""

    def refusal(self, weight: Tensor) -> str | None:
        """Why this weight cannot be multiplied here, or None."""

    def prepare(self, weight: Tensor) -> Tensor:
        """The weight [out, in] in the kernel's own form, one tensor."""

    def candidates(self, form: Tensor, product: Product) -> list[Settings]:
        """The settings worth measuring for products of this size."""

    def run(self, form: Tensor, product: Product, settings: Settings) -> Tensor:
        """[tokens, out] of ``out_dtype``."""


def unknown(dtype: torch.dtype, known: Collection[torch.dtype]) -> str | None:
    """The refusal of a dtype that a kernel does not know, or None."""
    names = ", ".join(str(other).removeprefix("torch.") for other in known)
    return None if dtype in known else f"{dtype} has no kernel; these have: {names}"


def padded(x: Tensor, multiple: int) -> Tensor:
    """The tokens [tokens, in] with rows of zeros up to a multiple of ``multiple``."""
    missing = -len(x) % multiple  # pad copies even where nothing is missing
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
