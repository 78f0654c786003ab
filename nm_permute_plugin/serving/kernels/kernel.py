# SPDX-License-Identifier: Apache-2.0
"""What every way to multiply by a 2:4 weight offers."""

from collections.abc import Collection
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Settings = tuple[int, ...]
"""What a kernel was tuned to; what the numbers mean is the kernel's own business."""

WIDE = (torch.bfloat16, torch.float16)
NARROW = (torch.float8_e4m3fn, torch.int8)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """
    What products of a weight's dtype come in.

    bfloat16 holds any sum of 8-bit products; what their scales make of it, float16 may not.
    """
    return dtype if dtype in WIDE else torch.bfloat16


@runtime_checkable
class Kernel(Protocol):
    """
    A way to multiply; stateless, so that one object serves all layers.

    Products are ``x @ weight.T``, of ``sums_dtype``: scales and bias come after
    (``scaling.py``).
    """

    @property
    def name(self) -> str:
        """What plans, tables and the environment call it."""

    def refusal(self, weight: Tensor) -> str | None:
        """Why this weight cannot be multiplied here, or None."""

    def prepare(self, weight: Tensor) -> Tensor:
        """The weight [out, in] in the kernel's own form, one tensor."""

    def candidates(self, form: Tensor, x: Tensor, rows: int) -> list[Settings]:
        """
        The settings worth measuring for products of this size.

        :param x: [tokens, in], of the weight's dtype
        :param rows: of the weight
        """

    def run(self, form: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        """[tokens, rows]: the product, by settings that were offered for its size."""


def unknown(dtype: torch.dtype, known: Collection[torch.dtype]) -> str | None:
    """The refusal of a dtype that a kernel does not know, or None."""
    names = ", ".join(str(other).removeprefix("torch.") for other in known)
    return None if dtype in known else f"{dtype} has no kernel; these have: {names}"


def padded(x: Tensor, multiple: int) -> Tensor:
    """The tokens [tokens, in] with rows of zeros up to a multiple of ``multiple``."""
    missing = -x.shape[0] % multiple  # pad copies even where nothing is missing
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
