# SPDX-License-Identifier: Apache-2.0
"""Scales and bias on a finished product, in Triton; import it where Triton is."""

import triton
import triton.language as tl


@triton.jit
def scale_kernel(
    raw,
    out,
    scale_x,
    scale_w,
    bias,
    columns,
    STEP_X: tl.constexpr,  # 1: a scale a token, 0: one number, -1: none
    STEP_W: tl.constexpr,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A token's part of ``COLUMNS`` outputs, each read and written once."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    at = token * columns + column
    value = tl.load(raw + at, mask=inside, other=0).to(tl.float32)
    if STEP_X >= 0:
        value *= tl.load(scale_x + token * STEP_X)
    if STEP_W == 1:
        value *= tl.load(scale_w + column, mask=inside, other=0)
    if STEP_W == 0:
        value *= tl.load(scale_w)
    if BIAS:
        value += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
