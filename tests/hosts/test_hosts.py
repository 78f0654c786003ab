# SPDX-License-Identifier: Apache-2.0
"""
The versions of transformers and compressed-tensors that read sparse checkpoints.

NM_PERMUTE_HOSTS names the interpreters of environments with other versions than this
one's, separated as in PATH: each reads what this environment wrote.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "checkpoint"), str(HERE.parent / "specs")]
from checkpoint_files import quantize  # noqa: E402
from zoo import ZOO, tiny  # noqa: E402

FORMATS = ("sparse-24-bitmask", "sparse-bitmask")
CASES = {"llama": "llama-gqa", "moe": "qwen3moe-gqa"}
OTHERS = [x for x in os.environ.get("NM_PERMUTE_HOSTS", "").split(os.pathsep) if x]
NONE = pytest.mark.skip(reason="NM_PERMUTE_HOSTS names no interpreters")
HOSTS = [
    pytest.param(sys.executable, id="this"),
    *([pytest.param(x) for x in OTHERS] or [pytest.param("", marks=NONE, id="others")]),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a Qwen3-MoE, in bf16 and FP8, stored dense and in both formats."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for kind, case in CASES.items():
        (values,) = [entry.values for entry in ZOO if entry.id == case]
        model = tiny(*values, torch.float32)
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                rows = parameter.data.flatten(0, -2)
                rows.masked_fill_(~nm_mask(rows.abs(), NMPattern(2, 4)), 0)
        model.bfloat16()
        for precision in ("bf16", "fp8"):
            dense = folder / f"{kind}-{precision}-dense"
            model.save_pretrained(dense)
            if precision == "fp8":
                quantize(dense, "fp8")
            for form in FORMATS:
                convert(dense, folder / f"{kind}-{precision}-{form}", form)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("python", HOSTS)
def test_a_sparse_checkpoint_is_read_and_saved_as_the_dense_one(
    checkpoints: Path, tmp_path: Path, python: str
) -> None:
    done = subprocess.run(
        [python, str(HERE / "read_and_save.py"), str(checkpoints), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found.pop("versions"))
    assert len(found) == len(CASES) * 2 * len(FORMATS)
    different = {
        f"{case}, {step}": names
        for case, steps in found.items()
        for step, names in steps.items()
        if names
    }
    assert not different
