# SPDX-License-Identifier: Apache-2.0
"""A 2:4 BERT is served as a model of embeddings."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_embeddings_are_those_of_the_dense_checkpoint(
    pruned, run_engine, tmp_path: Path
) -> None:
    sparse = pruned("bert", "sparse-24-bitmask")
    dense = pruned("bert", "dense")
    out = tmp_path / "said.json"
    done = run_engine("embed.py", out, sparse, dense)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(out.read_text())
    assert said[str(sparse)]["config"] == "Sparse24Config"
    first, second = said[str(sparse)]["vectors"]
    assert first != second
    assert said[str(sparse)]["vectors"] == said[str(dense)]["vectors"]
    # four layers of query, key and value in one, and three more linears
    assert "16 of 16 2:4 layers are served dense" in done.stdout + done.stderr
