# SPDX-License-Identifier: Apache-2.0
"""Scales and bias put on a finished product, in one pass over it."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_COLUMNS = 1024


def scaled(
    raw: Tensor,
    scale_x: Tensor | None,
    scale_w: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """
    ``raw * scale_x * scale_w + bias``, computed in float32; may overwrite ``raw``.

    :param raw: [tokens, out]
    :param scale_x: one number or [tokens, 1]; None is 1
    :param scale_w: one number or [out, 1]; None is 1
    :param bias: [out]
    :param out: [tokens, out] of ``out_dtype``, contiguous: written to and returned
    """
    kernel = _kernel() if raw.is_cuda and raw.is_contiguous() else None
    if kernel is None:
        value = raw.float()
        for scale in (scale_x, None if scale_w is None else scale_w.reshape(1, -1)):
            value = value if scale is None else value * scale
        value = (value if bias is None else value + bias).to(out_dtype)
        return value if out is None else out.copy_(value)
    tokens, columns = raw.shape
    if out is None:
        out = raw if raw.dtype == out_dtype else torch.empty_like(raw, dtype=out_dtype)
    if tokens:
        kernel[(tokens, -(-columns // _COLUMNS))](
            raw,
            out,
            raw if scale_x is None else scale_x.contiguous(),
            raw if scale_w is None else scale_w.contiguous(),
            raw if bias is None else bias,
            columns,
            STEP_X=_step(scale_x),
            STEP_W=_step(scale_w),
            BIAS=bias is not None,
            COLUMNS=_COLUMNS,
        )
    return out


def _step(scale: Tensor | None) -> int:
    """From one scale to the next: 0 for one number, -1 for none."""
    return -1 if scale is None else int(scale.numel() > 1)


@lru_cache(maxsize=1)
def _kernel() -> Any | None:  # Triton has no types
    """The compiled pass, or None without Triton."""
    try:
        from nm_permute_plugin.serving.kernels.triton_scaling import scale_kernel
    except ImportError:
        return None
    return scale_kernel
