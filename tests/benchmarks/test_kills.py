# SPDX-License-Identifier: Apache-2.0
"""The harness kills a run, has it go on, and sees what is not as it should be."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kills.py"


@pytest.mark.slow
def test_a_killed_run_goes_on(run_script, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "prune_stage:\n  permutation_modifiers:\n    LearnablePermutationModifier:\n"
        "      batch_size: 4\n      learn: {steps: 4}\n      search: {rounds: 1}\n"
    )
    words = ["--kills", "1", "--every", "0", "--no-pages", "--samples", "18"]
    said = run_script(SCRIPT, *words, "--recipe", recipe, "--folder", tmp_path)
    assert "1 of 1 went on to the same bytes" in said
    assert "| learning | SIGKILL | 1 of 1 |" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_what_tells_of_time_is_left_out(tmp_path: Path) -> None:
    import kills

    (tmp_path / "nm_permute").mkdir()
    for number in (1, 2):
        report = {"seconds": {"learn": number}, "history": [{"loss": 0.5}]}
        sums = {"files": {"nm_permute/report.json": str(number), "a": "0"}}
        (tmp_path / "nm_permute" / "report.json").write_text(json.dumps(report))
        (tmp_path / "nm_permute" / "checksums.json").write_text(json.dumps(sums))
        found = kills._contents(tmp_path)
        if number == 1:
            first = found
    assert found == first
    (tmp_path / "a").write_text("changed")
    assert kills._contents(tmp_path) != first
