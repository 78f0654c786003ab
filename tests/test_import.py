# SPDX-License-Identifier: Apache-2.0
"""Importing the package, or its command, imports nothing heavy."""

import subprocess
import sys

import pytest

HEAVY = ["torch", "scipy", "llmcompressor", "transformers", "compressed_tensors"]


@pytest.mark.parametrize(
    "module", ["nm_permute_plugin", "nm_permute_plugin.cli.app"], ids=["package", "cli"]
)
def test_an_import_loads_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        f"assert {module!r} in sys.modules\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "[]", run.stderr


def test_the_packages_own_modules_wait_too() -> None:
    code = (
        "import sys, nm_permute_plugin\n"
        "print(sorted(m for m in sys.modules if m.startswith('nm_permute_plugin')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = ["nm_permute_plugin", "nm_permute_plugin._registration"]
    assert run.stdout.strip() == str(loaded)
