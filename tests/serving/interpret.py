# SPDX-License-Identifier: Apache-2.0
"""
Run the Triton kernels and print how far they are from float64, as JSON.

A process of its own: Triton decides whether to interpret when it is first imported,
which torch may have done long before a test starts.
"""

import json
import os
from itertools import product

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if __name__ == "__main__" and DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from weights import error, exact, sparse_weight  # noqa: E402

from nm_permute_plugin.serving.kernels.triton_fallback import TritonDecode  # noqa: E402
from nm_permute_plugin.serving.tune import random_tokens  # noqa: E402

DECODES = [
    (tokens, shape, tile)
    for tokens in (1, 7, 17)
    for shape in ((48, 160), (33, 96))
    for tile in ((16, 32), (32, 16))
]
SCALINGS = list(product((False, True), repeat=4))


def decode_error(tokens: int, shape: tuple[int, int], tile: tuple[int, int]) -> float:
    """The interpreter multiplies the bit patterns of bfloat16, so it is float16 here."""
    weight = sparse_weight(*shape, torch.float16, seed=tokens, device=DEVICE)
    x = random_tokens(weight, tokens)
    kernel = TritonDecode()
    out = kernel.run(kernel.prepare(weight), x, len(weight), (*tile, 4, 2))
    return error(out, exact(weight, x))


def scaling_error(each_x: bool, each_w: bool, bias: bool, narrow: bool) -> float:
    """
    Scales and bias on whole numbers, by what is a number and what a vector.

    :param narrow: the weight's scales in bfloat16
    """
    from nm_permute_plugin.serving.kernels.triton_scaling import scale_kernel

    generator = torch.Generator(DEVICE).manual_seed(3)
    sums = torch.randint(-999, 999, (5, 300), generator=generator, device=DEVICE)
    sums = sums.to(torch.int32)
    scale_x = torch.rand(5 if each_x else 1, generator=generator, device=DEVICE)
    scale_w = torch.rand(300 if each_w else 1, generator=generator, device=DEVICE)
    if narrow:
        scale_w = scale_w.bfloat16()
    shift = torch.randn(300, generator=generator, device=DEVICE) * 100
    out = torch.empty(5, 300, device=DEVICE)
    cases = {"EACH_X": each_x, "EACH_W": each_w, "BIAS": bias, "COLUMNS": 128}
    scale_kernel[(5, 3)](sums, out, scale_x, scale_w, shift, 300, **cases)
    expected = sums.double() * scale_x.double().reshape(-1, 1) * scale_w.double()
    return error(out, expected + bias * shift.double())


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "decode": [decode_error(*case) for case in DECODES],
                "scaling": [scaling_error(*case) for case in SCALINGS],
            }
        )
    )
