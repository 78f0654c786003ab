# SPDX-License-Identifier: Apache-2.0
"""
A pruned checkpoint exported to ONNX by optimum says what it says in torch.

NM_PERMUTE_ONNX_PYTHON names the interpreter of an environment with
``optimum-onnx[onnxruntime]``, which wants another transformers than this one.
"""

import os
import sys
from pathlib import Path

import pytest

import nm_permute_plugin as nmp

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from export_onnx import compare  # noqa: E402

PYTHON = os.environ.get("NM_PERMUTE_ONNX_PYTHON", "")


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="NM_PERMUTE_ONNX_PYTHON names no interpreter")
def test_an_exported_checkpoint_says_the_same_in_onnxruntime(
    tiny_model, chain_rows, tmp_path: Path
) -> None:
    # Version 4 of transformers does not read this where version 5 writes it.
    model = tiny_model("llama", rope_parameters={"rope_theta": 500.0})
    data = nmp.read_samples(model, [{"input_ids": chain_rows(12, 32, seed=4)}])
    settings = nmp.Settings(method="search", search={"rounds": 1})
    nmp.save(model, tmp_path / "sparse", nmp.prune(model, data, settings))
    found = compare(tmp_path / "sparse", PYTHON, tmp_path / "out")
    print(found.versions)
    assert found.same == 1
    assert found.error < 1e-4 * found.largest
