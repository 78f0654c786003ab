# SPDX-License-Identifier: Apache-2.0
"""Triton's masks and moves are PyTorch's; in Triton's interpreter without a GPU."""

from pathlib import Path

SCRIPT = Path(__file__).parent / "interpret_mask_gradients.py"


def test_triton_finds_what_pytorch_finds(run_triton) -> None:
    differences = run_triton(SCRIPT)
    assert len(differences) == 12
    assert [case for case, (wrong, _) in enumerate(differences) if wrong] == []
    assert max(error for _, error in differences) < 1e-3
