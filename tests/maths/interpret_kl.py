# SPDX-License-Identifier: Apache-2.0
"""
Print how far Triton's divergence is from PyTorch's in float64, value and gradient a case.

A process of its own: Triton decides whether to interpret when it is first imported.
"""

import json
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if __name__ == "__main__" and DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from nm_permute_plugin.maths.kl_triton import (  # noqa: E402
    gradient,
    of_tokens,
)

CASES = [(torch.float32, 11), (torch.float32, 4096), (torch.bfloat16, 5000)]
SCALE = 3.0


def differences(dtype: torch.dtype, vocabulary: int) -> tuple[float, float]:
    """The largest difference of the values, and of the gradients."""
    generator = torch.Generator().manual_seed(vocabulary)
    ours, theirs = (
        (torch.randn(6, vocabulary, generator=generator) * 4).to(DEVICE, dtype)
        for _ in range(2)
    )
    ours[5] = float("nan")  # padding may hold anything
    counted = torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.bool, device=DEVICE)
    values, log_sums = of_tokens(ours, theirs, counted)
    scale = torch.tensor(SCALE, device=DEVICE)
    grad = gradient(ours, theirs, counted, log_sums, scale)

    plain = ours.double().nan_to_num(0).requires_grad_()
    log_theirs = theirs.double().log_softmax(-1)
    every = (log_theirs.exp() * (log_theirs - plain.log_softmax(-1))).sum(-1)
    expected = every.masked_fill(~counted, 0)
    (SCALE * expected.sum()).backward()
    wrong = (values.double() - expected.detach()).abs().max()
    return float(wrong), float((grad.double() - plain.grad).abs().max())


if __name__ == "__main__":
    print(json.dumps([differences(*case) for case in CASES]))
