# SPDX-License-Identifier: Apache-2.0
"""Dequantise the accumulators of an 8-bit product: scales, then bias."""

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

FAULTS: list[str] = []
"""How Triton failed in this process; it is not asked again."""

_COLUMNS = 1024
"""Each program of the Triton kernel scales this many outputs of one token."""


def scaled(
    sums: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """
    Compute ``sums * scale_x * scale_w + bias`` in float32.

    A compiler fuses it into whatever reads the output; otherwise one Triton kernel runs.

    :param sums: the unscaled product [tokens, out], which may be overwritten
    :param scale_x: float32, one number or [tokens, 1]
    :param scale_w: float32 or bfloat16, one number or [out, 1]
    :param bias: [out]
    :raises ValueError: if a scale is of another dtype
    """
    if scale_x.dtype != torch.float32:
        raise ValueError(f"scale_x is {scale_x.dtype}; it must be float32")
    if scale_w.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"scale_w is {scale_w.dtype}; it must be float32 or bfloat16")
    if not torch.compiler.is_compiling() and sums.is_cuda and (kernel := _kernel()):
        try:
            return _in_triton(kernel, sums, scale_x, scale_w, bias, out_dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of its compiler, of a damaged cache: many classes
            FAULTS.append(f"{type(error).__name__}: {error}")
            logger.warning(
                "8-bit products are scaled by PyTorch, which takes longer: Triton failed "
                "with %s",
                FAULTS[-1],
            )
    value = sums.float() * scale_x * scale_w.reshape(1, -1)
    return (value if bias is None else value + bias).to(out_dtype)


def _in_triton(
    kernel: Any,  # Triton has no types
    sums: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Do what ``scaled`` does in one kernel."""
    tokens, columns = sums.shape
    sums = sums.contiguous()
    out = sums if sums.dtype == out_dtype else torch.empty_like(sums, dtype=out_dtype)
    if tokens:
        kernel[(tokens, -(-columns // _COLUMNS))](
            sums,
            out,
            scale_x.contiguous(),
            scale_w.contiguous(),
            sums if bias is None else bias,
            columns,
            EACH_X=scale_x.numel() > 1,
            EACH_W=scale_w.numel() > 1,
            BIAS=bias is not None,
            COLUMNS=_COLUMNS,
        )
    return out


def narrowest(scale: Tensor) -> Tensor:
    """
    Convert a float32 scale to bfloat16 if that changes no value; else return it as it is.

    With few tokens, scaling reads about as many bytes of scales as of sums.
    """
    narrow = scale.bfloat16()
    return narrow if torch.equal(narrow.float(), scale) else scale


def _kernel() -> Any | None:
    """Return the Triton kernel; None if Triton is not installed, or has failed."""
    return None if FAULTS else _installed()


@lru_cache(maxsize=1)
def _installed() -> Any | None:
    try:
        from nm_permute_plugin.serving.kernels.triton_scaling import scale_kernel
    except ImportError:
        return None
    return scale_kernel
