# SPDX-License-Identifier: Apache-2.0
"""Triton's masks and gradients are PyTorch's; in Triton's interpreter without a GPU."""

from pathlib import Path

SCRIPT = Path(__file__).parent / "interpret_mask_gradients.py"


def test_triton_finds_what_pytorch_finds(run_triton) -> None:
    cases = run_triton(SCRIPT)
    assert len(cases) == 9
    assert [number for number, case in enumerate(cases) if case["masks"]] == []
    assert max(case["score_gradient"] for case in cases) < 1e-3
    assert max(case["move_costs"] for case in cases) < 1e-3
    # A program goes through several row groups, or through a share of one.
    assert {case["groups_per_part"] > 1 for case in cases} == {True, False}
    assert {case["shares"] > 1 for case in cases} == {True, False}
