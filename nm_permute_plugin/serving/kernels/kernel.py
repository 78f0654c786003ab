# SPDX-License-Identifier: Apache-2.0
"""The interface of all kernels, and the dtypes that they know."""

from collections.abc import Callable, Collection
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Words = ParamSpec("Words")
Result = TypeVar("Result")

Settings = tuple[int, ...]
"""A kernel's tuning parameters; each kernel defines what its numbers mean."""

DTYPES_16 = (torch.bfloat16, torch.float16)
"""Weights of 16 bits: their products need no scales."""

DTYPES_8 = (torch.float8_e4m3fn, torch.int8)
"""Weights of 8 bits: their products are scaled afterwards."""


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """
    Return the output dtype of the unscaled product for a weight's dtype.

    bfloat16 holds every unscaled sum of 8-bit products; float16 would overflow.
    """
    return dtype if dtype in DTYPES_16 else torch.bfloat16


@runtime_checkable
class Kernel(Protocol):
    """
    A kernel that computes ``x @ weight.T``; stateless, so one object serves all layers.

    The product is of ``output_dtype``; scales and bias are applied later, by
    ``scaling.py``.
    """

    @property
    def name(self) -> str:
        """Its name in kernel tables and in ``NM_PERMUTE_KERNEL``."""

    def unsupported(self, weight: Tensor) -> str | None:
        """Return why this kernel cannot multiply by the weight; None if it can."""

    def prepare(self, weight: Tensor) -> Tensor:
        """Pack the weight [out, in] into one tensor of the kernel's own layout."""

    def unpack(
        self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """
        Return the weight [out, in] that ``prepare`` packed.

        Its bits come back, but for those of -0.0 and, with cuSPARSELt, of values that are
        not finite.

        :param shape: [out, in] of the weight
        :param dtype: the weight's dtype
        """

    def candidates(self, packed: Tensor, x: Tensor, rows: int) -> list[Settings]:
        """
        List the settings worth measuring for products of this size.

        :param x: [tokens, in], of the weight's dtype
        :param rows: the number of output channels
        """

    def takes(self, weight: Tensor, tokens: int, settings: Settings) -> bool:
        """
        Whether settings that were kept on disk are of this kernel and size.

        :param weight: [out, in], of which dtype and device count
        """

    def run(self, packed: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        """
        Multiply: [tokens, rows]. ``candidates`` offered the settings for this size.

        :raises RuntimeError: if the card, its driver or a library refuses the product
        """


def unsupported_dtype(dtype: torch.dtype, known: Collection[torch.dtype]) -> str | None:
    """Return why a kernel cannot multiply by a dtype; None if it is a known one."""
    names = ", ".join(str(other).removeprefix("torch.") for other in known)
    return None if dtype in known else f"{dtype} has no kernel; these have: {names}"


def unsupported_card(weight: Tensor) -> str | None:
    """Return why no sparse kernel runs on a weight's device; None if some do."""
    if not weight.is_cuda:
        return "no CUDA device"
    if torch.version.hip is not None:
        return "the sparse kernels are for NVIDIA's cards"
    found = torch.cuda.get_device_capability(weight.device)
    lowest = (8, 9) if weight.dtype == torch.float8_e4m3fn else (8, 0)
    if found >= lowest:
        return None
    return "its card has compute capability {}.{}, {} needs {}.{}".format(
        *found, str(weight.dtype).removeprefix("torch."), *lowest
    )


def padded(x: Tensor, multiple: int) -> Tensor:
    """Append rows of zeros until the number of tokens is a multiple of ``multiple``."""
    missing = -x.shape[0] % multiple  # pad copies even where nothing is missing
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def runs_triton(call: Callable[Words, Result]) -> Callable[Words, Result]:
    """
    Have a function raise RuntimeError for all that Triton raises.

    Its compiler and a damaged cache raise errors of many classes.
    """

    @wraps(call)
    def told(*args: Words.args, **kwargs: Words.kwargs) -> Result:
        try:
            return call(*args, **kwargs)
        except RuntimeError:
            raise
        except Exception as error:
            text = f"Triton: {type(error).__name__}: {error}"
            raise RuntimeError(text) from error

    return told
