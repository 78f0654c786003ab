# SPDX-License-Identifier: Apache-2.0
"""A kernel that cannot run is found out in a process of its own."""

import pytest
import torch
from weights import sparse_weight

from nm_permute_plugin.serving.probe import survives


@pytest.mark.skipif(torch.cuda.is_available(), reason="the point is a missing GPU")
def test_a_process_that_dies_is_told_with_its_last_words() -> None:
    reason = survives("mma_sp", sparse_weight(32, 128, torch.bfloat16))
    assert reason
    assert "Error" in reason
