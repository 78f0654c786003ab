# SPDX-License-Identifier: Apache-2.0
"""Records of results: read, merged, and shown."""

import json
from pathlib import Path

import pytest

from nm_permute_plugin.evaluation.report import gap_closed
from report import PROTOCOL, check_protocol, gaps, merged, plot, read, table, write

ARGUMENTS = dict.fromkeys(PROTOCOL, "1")


def result(method: str, seed: int, perplexity: float, **cost: float) -> dict:
    return {
        "method": method,
        "seed": seed,
        "perplexity": perplexity,
        "seconds": 60.0,
    } | (cost)


def record(*results: dict, **arguments: str) -> dict:
    return {
        "hardware": "CPU",
        "arguments": ARGUMENTS | arguments,
        "dense": 10.0,
        "results": list(results),
    }


WANDA = result("wanda", 0, 100.0)
ONE = record(WANDA, result("learned", 1, 30.0, tokens=8192, peak_gib=1.5))
OTHER = record(result("learned", 0, 20.0), WANDA)


def test_merged_results_are_those_of_both_in_one_order() -> None:
    both = merged([ONE, OTHER])
    shown = [(r["method"], r["seed"]) for r in both["results"]]
    assert shown == [("wanda", 0), ("learned", 0), ("learned", 1)]


def test_gap_is_relative_to_wanda() -> None:
    expected = [gap_closed(20.0, 100.0, 10.0), gap_closed(30.0, 100.0, 10.0)]
    assert gaps(merged([ONE, OTHER])) == {"learned": expected}


def test_two_figures_of_one_run_are_refused() -> None:
    other = record(result("wanda", 0, 90.0))
    with pytest.raises(ValueError, match=r"wanda, seed 0.*100.0 and 90.0"):
        merged([ONE, other])


@pytest.mark.parametrize("name", ["steps", "window", "pattern"])
def test_other_protocols_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 1 and 2"):
        merged([ONE, record(**{name: "2"})])
    check_protocol(ARGUMENTS, ARGUMENTS | {"learning_rate": "3"})


def test_table_shows_means_spread_and_cost() -> None:
    lines = table(merged([ONE, OTHER])).splitlines()
    closed = [gap_closed(value, 100.0, 10.0) for value in (20.0, 30.0)]
    expected = (
        f"| learned | 2 | 25.00 | {sum(closed) / 2:.1%} "
        f"| {closed[1]:.1%} to {closed[0]:.1%} | 60 | 1.5 | 8,192 |"
    )
    assert lines[3:] == ["| wanda | 1 | 100.00 |  |  | 60 |  |  |", expected]


def test_table_without_wanda_shows_no_gaps() -> None:
    only = record(result("search", 0, 50.0))
    assert "| search | 1 | 50.00 |  |  | 60 |  |  |" in table(only)


def test_plot_is_a_picture(tmp_path: Path) -> None:
    worse = record(result("magnitude", 0, 9000.0))
    plot(merged([ONE, OTHER, worse]), tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").read_bytes().startswith(b"\x89PNG")


def test_plot_needs_wanda(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="relative to wanda"):
        plot(record(result("search", 0, 50.0)), tmp_path / "gaps.png")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    write(ONE, path)
    assert read(path) == ONE
    assert [file.name for file in tmp_path.iterdir()] == ["quality.json"]


def test_other_files_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"other.json is no record"):
        read(path)
