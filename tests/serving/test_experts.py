# SPDX-License-Identifier: Apache-2.0
"""The kernels of routed experts, in Triton's interpreter where there is no GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from weights import BOUND

from nm_permute_plugin.serving.kernels.experts import StoredExperts, unsupported

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(run_triton) -> dict[str, Any]:
    """What ``interpret_experts.py`` found."""
    return run_triton(HERE / "interpret_experts.py")


def test_products_agree_with_float64(found: dict[str, Any]) -> None:
    # random shapes, empty experts, several blocks of one expert, experts of other devices
    assert len(found["products"]) == 16
    assert max(found["products"]) < BOUND


def test_pairs_are_sorted_into_blocks_of_one_expert(found: dict[str, Any]) -> None:
    assert found["alignments"] == [True] * 12


def test_dense_weights_are_written_bit_by_bit(found: dict[str, Any]) -> None:
    assert found["expansions"] == [True] * 2


def test_the_fastest_kernel_is_chosen_and_wrong_results_are_left_out(
    found: dict[str, Any],
) -> None:
    # vLLM's takes longer, as long, and less; the one that is wrong is never timed
    expected = [["experts", 2, False], ["experts", 2, False], ["dense", 2, False]]
    assert found["choices"] == expected


def test_the_kernel_compiles_for_every_card_without_spilling_much(run_triton) -> None:
    found = run_triton(HERE / "compile_experts.py")
    assert {row["card"] for row in found} == {80, 90, 100}
    assert len(found) == 12
    for row in found:
        assert row["mma"], row  # tensor cores, and not loops
        assert row["shared"] <= 96 << 10, row
        assert row["spilled"] <= 64, row


def stored(channels: int, dtype: torch.dtype) -> StoredExperts:
    values = torch.zeros(2, 16, channels // 2, dtype=torch.float32).to(dtype)
    return StoredExperts(values, torch.zeros(2, 16, channels // 8, dtype=torch.uint8))


def test_what_the_kernel_does_not_multiply_is_told() -> None:
    bf16 = stored(64, torch.bfloat16)
    assert unsupported(bf16, bf16) == "no CUDA device"
    fp8 = stored(64, torch.float8_e4m3fn)
    assert "float8_e4m3fn has no kernel" in str(unsupported(fp8, fp8))
