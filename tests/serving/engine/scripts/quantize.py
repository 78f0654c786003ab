# SPDX-License-Identifier: Apache-2.0
"""How our compiled quantization differs from vLLM's operator, as JSON."""

import json

import torch

from nm_permute_plugin.serving.product import quantize_int8


def differences(scale):
    """Values that differ, and the largest difference of scales."""
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[3] = 0
    compiled = torch.compile(quantize_int8, fullgraph=True)
    ours, theirs = compiled(x, scale), quantize_int8(x, scale)
    assert ours[0].dtype == theirs[0].dtype == torch.int8
    assert ours[1].shape == theirs[1].shape
    assert int(theirs[0].abs().max()) > 100
    values = int((ours[0] != theirs[0]).sum())
    return [values, float((ours[1] - theirs[1]).abs().max())]


if __name__ == "__main__":
    print(json.dumps([differences(None), differences(torch.tensor([0.02]))]))
