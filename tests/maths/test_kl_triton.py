# SPDX-License-Identifier: Apache-2.0
"""Triton's divergence is PyTorch's; in Triton's interpreter without a GPU."""

from pathlib import Path

SCRIPT = Path(__file__).parent / "interpret_kl.py"


def test_triton_finds_the_values_and_gradients_of_pytorch(run_triton) -> None:
    differences = run_triton(SCRIPT)
    assert len(differences) == 3
    assert max(value for value, _ in differences) < 1e-4
    of_float32, of_bfloat16 = differences[:2], differences[2:]
    assert max(grad for _, grad in of_float32) < 1e-5
    assert max(grad for _, grad in of_bfloat16) < 1e-2
