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
    monkeypatch.setenv(gpu_checks.plan.CACHE, str(tmp_path))
    try:
        gpu_checks.CHECKS[name]()
    except gpu_checks.Skip as reason:
        pytest.skip(str(reason))
