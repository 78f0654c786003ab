# SPDX-License-Identifier: Apache-2.0
"""Orders of what stays dense are compared on a tiny trained model."""

import json
from pathlib import Path

import pytest

import stays_dense


def test_every_order_has_its_losses(
    arguments: list[str], text_file, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    model, *rest = arguments
    more = ["--test", text_file("test", 5), "--windows", "6", "--alone"]
    stays_dense.main(
        [model, str(out), *rest, *more, "--random", "1", "--dtype", "float32"]
    )
    found = json.loads(out.read_text())
    rows = {row["order"]: row["losses"] for row in found["rows"]}
    assert list(rows) == [
        "integrated gradients (budget)",
        "opened alone",
        "closed alone",
        "layer error",
        "first and last layers",
        "random, seed 0",
    ]
    # A tiny model's groups are too large for small shares; half of them is another thing.
    for losses in rows.values():
        assert losses[-1] < found["all_sparse"]
    assert rows["integrated gradients (budget)"][-1] < rows["random, seed 0"][-1]
    printed = capsys.readouterr().out
    assert f"All sparse: {found['all_sparse']:.4f}" in printed
    assert printed.count("\n| ") == 1 + len(rows)


def test_what_stays_sparse_is_learned_after_the_choice(
    arguments: list[str], text_file, tmp_path: Path
) -> None:
    model, *rest = arguments
    more = ["--test", text_file("test", 5), "--windows", "6", "--shares", "0.5"]
    found = []
    for then in "0", "6":
        out = tmp_path / f"{then}.json"
        options = [*rest, *more, "--random", "1", "--dtype", "float32", "--then", then]
        stays_dense.main([model, str(out), *options])
        found.append(json.loads(out.read_text()))
    before, after = found
    assert after["all_sparse"] < before["all_sparse"]
    assert after["rows"][0]["losses"] < before["rows"][0]["losses"]
