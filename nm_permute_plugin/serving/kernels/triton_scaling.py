# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of ``scaling.py``; importing it needs Triton."""

import triton
import triton.language as tl


@triton.jit
def scale_kernel(
    sums,
    out,
    scale_x,
    scale_w,
    bias,
    columns,
    EACH_X: tl.constexpr,  # a scale a token, or one number
    EACH_W: tl.constexpr,  # a scale an output, or one number
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scale ``COLUMNS`` outputs of one token, each read and written once."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    at = token * columns + column
    value = tl.load(sums + at, mask=inside, other=0).to(tl.float32)
    value *= tl.load(scale_x + token * EACH_X)
    if EACH_W:
        value *= tl.load(scale_w + column, mask=inside, other=0).to(tl.float32)
    else:
        value *= tl.load(scale_w).to(tl.float32)
    if BIAS:
        value += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
