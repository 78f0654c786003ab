# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, in Triton's interpreter where there is no GPU."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from weights import BOUND, sparse_weight

from nm_permute_plugin.serving.kernels.triton_fallback import TritonDecode

SCRIPT = Path(__file__).parent / "interpret.py"


@pytest.fixture(scope="module")
def errors(run_triton) -> dict[str, list[float]]:
    """By kernel, the errors of all cases of ``interpret.py``."""
    return run_triton(SCRIPT)


def test_decode_agrees_with_float64(errors: dict[str, list[float]]) -> None:
    assert len(errors["decode"]) == 12
    assert max(errors["decode"]) < BOUND


def test_scaling_agrees_with_float64(errors: dict[str, list[float]]) -> None:
    assert len(errors["scaling"]) == 16
    assert max(errors["scaling"]) < 1e-6


def test_packed_bytes_are_values_and_places_alone() -> None:
    weight = sparse_weight(64, 256, torch.bfloat16)
    assert TritonDecode().prepare(weight).nbytes == 9 / 16 * weight.nbytes


def test_what_triton_raises_is_an_error_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def damaged(*arguments: object) -> None:
        raise ValueError("Expecting value: line 1 column 1 (char 0)")

    stand_in = ModuleType("stand_in")  # importing the true one takes Triton
    stand_in.decode = damaged
    name = "nm_permute_plugin.serving.kernels.triton_decode"
    monkeypatch.setitem(sys.modules, name, stand_in)
    x = torch.zeros(1, 128)
    with pytest.raises(RuntimeError, match="^Triton: ValueError: Expecting value"):
        TritonDecode().run(torch.zeros(1, 144), x, 1, (16, 128, 4, 3))
