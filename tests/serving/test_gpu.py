# SPDX-License-Identifier: Apache-2.0
"""The checks of ``gpu_checks.py``, one test each."""

import gpu_checks
import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", gpu_checks.CHECKS)
def test_check_holds_on_the_gpu(
    name: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gpu_checks.cache.FOLDER, str(tmp_path))
    outcome = gpu_checks.outcome_of(name)
    if outcome.startswith("skipped"):
        pytest.skip(outcome)
    assert outcome == "ok"


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [
        (None, "ok"),
        (gpu_checks.Skip("no such card"), "skipped: no such card"),
        (AssertionError("off by 0.1"), "FAILED: AssertionError: off by 0.1"),
        (RuntimeError("illegal access"), "FAILED: RuntimeError: illegal access"),
    ],
    ids=["holds", "skipped", "wrong", "crashes"],
)
def test_a_check_that_does_not_hold_is_told(
    raised: Exception | None, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> None:
        if raised is not None:
            raise raised

    monkeypatch.setitem(gpu_checks.CHECKS, "check", check)
    assert gpu_checks.outcome_of("check") == outcome
