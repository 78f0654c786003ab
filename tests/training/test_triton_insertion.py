# SPDX-License-Identifier: Apache-2.0
"""Triton's masks and moves are PyTorch's; in Triton's interpreter without a GPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "interpret_insertion.py"
ROOT = SCRIPT.parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
def test_triton_finds_what_pytorch_finds(pytestconfig: pytest.Config) -> None:
    command = [sys.executable]
    if pytestconfig.pluginmanager.hasplugin("_cov"):
        data, source = f"--data-file={ROOT / '.coverage'}", "--source=nm_permute_plugin"
        command += ["-m", "coverage", "run", "--parallel-mode", data, source]
    run = subprocess.run(
        [*command, str(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    differences = json.loads(run.stdout.splitlines()[-1])
    assert len(differences) == 12
    assert [case for case, (wrong, _) in enumerate(differences) if wrong] == []
    assert max(error for _, error in differences) < 1e-3
