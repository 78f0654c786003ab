# SPDX-License-Identifier: Apache-2.0
"""vLLM on a CPU with AMX, made to compute what it computes on any other CPU."""

import torch

scaled_mm = torch._scaled_mm


def scaled_mm_of_pytorch(*tensors, **options):
    """Multiply FP8 without oneDNN: the same bits, in a fortieth of the time with AMX."""
    with torch.backends.mkldnn.flags(enabled=False):
        return scaled_mm(*tensors, **options)


def multiply_fp8_fast():
    """Keep FP8 products from the reference routine that oneDNN has for AMX."""
    torch._scaled_mm = scaled_mm_of_pytorch


def keep_static_scales():
    """
    Turn off vLLM's kernels for AMX, which ignore a given scale of the activations.

    They quantize each token by a scale of its own, as neither GPUs nor other CPUs do.
    """
    torch.cpu._is_amx_tile_supported = lambda: False
