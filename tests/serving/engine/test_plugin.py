# SPDX-License-Identifier: Apache-2.0
"""The entry point: where it leads, what it costs, that it may be called twice."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def test_the_entry_point_leads_to_a_function() -> None:
    groups = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]
    module, _, name = groups["vllm.general_plugins"]["nm_sparse24"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_the_door_is_light() -> None:
    code = (
        "import sys, nm_permute_plugin.serving.plugin\n"
        "heavy = ['torch', 'scipy', 'transformers', 'llmcompressor', 'vllm']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
def test_registering_twice_is_registering_once(engine_says) -> None:
    found = engine_says("registration.py", alone=True)
    assert "is for 2:4 checkpoints" in found.pop("error")
    assert found.pop("quantized").startswith("--quantization fp8 would quantize this")
    # a tower's names get prefixes in vLLM; classes and patterns stay
    assert found.pop("targets") == [
        "Linear",
        "re:model.*",
        "text.model.layers.0.mlp.up_proj",
    ]
    assert found.pop("ignore") == ["text.lm_head"]
    assert found == {
        "times": 1,
        "class": "Sparse24Config",
        "stock": ["CompressedTensorsConfig", "CompressedTensorsConfig"],
        "imported": [],
        "cuda": False,
    }
