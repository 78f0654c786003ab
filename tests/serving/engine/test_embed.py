# SPDX-License-Identifier: Apache-2.0
"""2:4 encoders are served as models of embeddings."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_embeddings_are_those_of_the_dense_checkpoint(
    pruned, run_engine, tmp_path: Path
) -> None:
    out = tmp_path / "said.json"
    pairs = [
        [str(pruned(kind, form)) for form in ("sparse-24-bitmask", "dense")]
        for kind in ("bert", "roberta")
    ]
    done = run_engine("embed.py", out, *pairs[0], *pairs[1])
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(out.read_text())
    for sparse, dense in pairs:
        assert said[sparse]["config"] == "Sparse24Config"
        first, second = said[sparse]["vectors"]
        assert first != second
        assert said[sparse]["vectors"] == said[dense]["vectors"]
    # four layers of query, key and value in one, and three more linears
    counted = "16 of 16 2:4 layers are served dense"
    assert (done.stdout + done.stderr).count(counted) == 2
