# SPDX-License-Identifier: Apache-2.0
"""Scales and bias of products of 8 bits, which come in sums."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_COLUMNS = 1024


def scaled(
    sums: Tensor,
    scale_x: Tensor,
    scale_w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """
    ``sums * scale_x * scale_w + bias``, computed in float32.

    A compiler makes it part of whatever reads it, at no cost; otherwise it is one pass.

    :param sums: [tokens, out], which may be overwritten
    :param scale_x: float32, one number or [tokens, 1]
    :param scale_w: float32, one number or [out, 1]
    :param bias: [out]
    :raises ValueError: if a scale is not float32, as the pass reads it
    """
    for name, scale in (("scale_x", scale_x), ("scale_w", scale_w)):
        if scale.dtype != torch.float32:
            raise ValueError(f"{name} is {scale.dtype}; scales are float32")
    kernel = None if torch.compiler.is_compiling() or not sums.is_cuda else _kernel()
    if kernel is None:
        value = sums.float() * scale_x * scale_w.reshape(1, -1)
        return (value if bias is None else value + bias).to(out_dtype)
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


@lru_cache(maxsize=1)
def _kernel() -> Any | None:  # Triton has no types
    """The compiled pass, or None without Triton."""
    try:
        from nm_permute_plugin.serving.kernels.triton_scaling import scale_kernel
    except ImportError:
        return None
    return scale_kernel
