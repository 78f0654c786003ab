# SPDX-License-Identifier: Apache-2.0
"""The Triton sum of moves is the PyTorch one; in Triton's interpreter without a GPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "interpret_moves.py"


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
def test_triton_sums_what_pytorch_sums() -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    differences = json.loads(run.stdout.splitlines()[-1])
    assert len(differences) == 12
    assert max(differences) < 1e-4
