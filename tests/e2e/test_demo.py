# SPDX-License-Identifier: Apache-2.0
"""The demo on the real pretrained model, with a budget of a minute or two."""

import json
from pathlib import Path

import pytest

from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.cli.demo import METHODS, Budget, run_demo
from nm_permute_plugin.cli.embedded import embedded_text

SMALL = Budget(rows=12, sequence_length=128, windows=8, search_rounds=3, steps=4)


@pytest.mark.slow
def test_every_method_of_the_demo_leaves_a_measured_2of4_checkpoint(
    smollm2: Path, tmp_path: Path
) -> None:
    (tmp_path / "dense").symlink_to(smollm2)
    rows = run_demo(tmp_path, embedded_text(), SMALL, "cpu")
    by_method = {row.method: row.perplexity for row in rows}
    assert list(by_method) == ["dense", *METHODS]
    assert by_method["dense"] < by_method["search"] < by_method["wanda"]
    assert by_method["dense"] < by_method["learned"] < by_method["wanda"]
    assert by_method["wanda"] < by_method["magnitude"]

    for method in METHODS:
        report = verify(tmp_path / method)
        assert report.faults == ()
        pruned = [row for row in report.rows if row.promised]
        assert len(pruned) == 210
        assert {row.format for row in pruned} == {"sparse-24-bitmask"}
    record = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in record["rows"]] == list(by_method)
