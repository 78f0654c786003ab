# SPDX-License-Identifier: Apache-2.0
"""What becomes of activations before an 8-bit product, as JSON."""

import json

import torch

GIVEN = torch.tensor([0.02])


def activations():
    """Tokens of different sizes, one of them zeros."""
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    x *= torch.linspace(0.1, 1, 7)[:, None]
    x[3] = 0
    return x.bfloat16()


def int8_differences(scale):
    """Compiled and not: values that differ, and the largest difference of scales."""
    from nm_permute_plugin.serving.product import quantize_int8

    x = activations()
    compiled = torch.compile(quantize_int8, fullgraph=True)
    ours, theirs = compiled(x, scale), quantize_int8(x, scale)
    assert ours[0].dtype == theirs[0].dtype == torch.int8
    assert ours[1].shape == theirs[1].shape
    assert int(theirs[0].abs().max()) > 100
    values = int((ours[0] != theirs[0]).sum())
    return [values, float((ours[1] - theirs[1]).abs().max())]


def fp8_error(scale):
    """The largest error as a share of a token's largest value, and the scales' shape."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from nm_permute_plugin.serving.product import fp8_quantizer

    x = activations().float()
    with set_current_vllm_config(VllmConfig()):
        quantize = fp8_quantizer(static=scale is not None)
    values, found = quantize(x.bfloat16(), scale)
    assert values.dtype == torch.float8_e4m3fn
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-9)
    error = (values.float() * found - x).abs() / largest
    return [float(error.max()), list(found.shape)]


if __name__ == "__main__":
    said = {
        "int8": [int8_differences(None), int8_differences(GIVEN)],
        "fp8": [fp8_error(None), fp8_error(GIVEN)],
    }
    print(json.dumps(said))
