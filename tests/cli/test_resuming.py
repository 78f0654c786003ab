# SPDX-License-Identifier: Apache-2.0
"""A run that died goes on, and ends with the bytes of one that nobody disturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import listing
from helpers import ours

SCRIPT = Path(__file__).with_name("kill_runs.py")

RECIPES = {
    "recovered": ours(
        batch_size=4,
        learn={"stages": ["swaps", "multipliers"], "steps": [3, 5]},
        search={"rounds": 2},
        validation={"every": 2},
        recover={"stages": ["blocks", "end_to_end"], "end_to_end": {"steps": 5}},
    ),
    "layers": ours(
        batch_size=4,
        objective="layer_wise",
        learn={"stages": ["straight_through", "multipliers"], "steps": 3},
        search={"rounds": 2},
        validation={"every": 2},
    ),
}

MOMENTS = {
    "recovered search:1:SIGKILL": "the finished output sensitivity",
    "recovered step:6:SIGKILL": "step 5 of the learning",
    "recovered validation:7:SIGTERM": "step 2 of the learning",
    "recovered window:2:SIGKILL": "the finished rebuilding of layer 0",
    "recovered step:12:SIGINT": "step 3 of the distilling",
    "recovered save:1:SIGKILL": "the finished recovery end_to_end",
    "layers layer_step:5:SIGKILL": "step 4 of the learning of model.layers.0",
    "layers layer_step:9:SIGHUP": "step 2 of the learning of model.layers.1",
}
"""When a run dies, and from where it goes on."""


@pytest.fixture(scope="module")
def ends(
    trained_checkpoint: Path, chain_rows, words, tmp_path_factory: Any
) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The folder of all runs, and how they ended: see ``kill_runs.py``."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "dense").symlink_to(trained_checkpoint)
    (folder / "text.txt").write_text(words(chain_rows(40, 32, seed=3)))
    given: list[str] = []
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(recipe)
        given += [name, *(m.split()[1] for m in MOMENTS if m.startswith(name))]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), *given],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a checkpoint, less what tells of times."""
    files = {name: out / name for name in listing(out) if (out / name).is_file()}
    found = {name: path.read_bytes() for name, path in files.items()}
    report, sums = "nm_permute/report.json", "nm_permute/checksums.json"
    untimed = json.dumps(timeless(json.loads(found[report])))
    others = json.loads(found[sums])
    del others["files"][report]
    return found | {report: untimed.encode(), sums: json.dumps(others).encode()}


def timeless(value: Any) -> Any:
    """A report without the seconds that it tells."""
    if isinstance(value, dict):
        return {key: timeless(of) for key, of in value.items() if key != "seconds"}
    return [timeless(of) for of in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_died_ends_with_the_same_bytes(ends, moment: str) -> None:
    folder, runs = ends
    (undisturbed,), (died, went_on) = runs[moment.split()[0]], runs[moment]
    assert undisturbed["status"] == 0, undisturbed["log"]
    assert undisturbed["beside"] == []
    out = died["out"]
    state = f".{out}.nm_permute_state"
    assert died["status"] != 0, died["log"]
    assert state in died["beside"], died["log"]
    assert f"The run goes on from {MOMENTS[moment]}" in went_on["log"]
    assert went_on["status"] == 0, went_on["log"]
    assert went_on["beside"] == []
    expected, found = contents(folder / undisturbed["out"]), contents(folder / out)
    assert found.keys() == expected.keys()
    assert [file for file in found if found[file] != expected[file]] == []
    if not moment.endswith("SIGKILL"):
        assert f"The same command goes on from {MOMENTS[moment]}" in died["log"]
        assert died["beside"] == [state]
