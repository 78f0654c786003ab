# SPDX-License-Identifier: Apache-2.0
"""
Every method gives the permutations, masks and weights that it gave before.

``golden.json`` changes only in a commit that says which method gives something else, and
why: ``python tests/pruning/test_golden.py`` writes it anew.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECORD = Path(__file__).with_name("golden.json")
RECORDED: dict = json.loads(RECORD.read_text())
ALIKE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
}
"""Has CPUs of every kind round alike."""


def measured() -> dict:
    """What ``golden.py`` finds, in a process of its own."""
    script = Path(__file__).with_name("golden.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **ALIKE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found() -> dict:
    found = measured()
    if found["trained"] != RECORDED["trained"]:
        pytest.skip("this CPU rounds otherwise: even the model to prune is another one")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(RECORDED) - {"trained"}))
def test_as_before(found: dict, method: str) -> None:
    recorded = RECORDED[method]
    assert found[method]["perms"] == recorded["perms"]
    assert found[method]["masks"] == recorded["masks"]
    assert found[method]["weights"] == pytest.approx(recorded["weights"], rel=1e-5)
    assert found[method]["dense"] <= recorded["dense"]


def test_methods_differ(found: dict) -> None:
    """Hashes that are all alike would guard nothing."""
    masks = {method: of["masks"] for method, of in found.items() if method != "trained"}
    same = {"learned", "learned_micro_batches", "recover"}
    assert len({masks[method] for method in same}) == 1
    assert len(set(masks.values())) == len(masks) - len(same) + 1


if __name__ == "__main__":
    RECORD.write_text(json.dumps(measured(), indent=1) + "\n")
