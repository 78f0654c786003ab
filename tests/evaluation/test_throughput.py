# SPDX-License-Identifier: Apache-2.0
"""Timings become tokens a second and milliseconds, a table and a picture."""

import sys
from pathlib import Path

import pytest

from nm_permute_plugin.evaluation.throughput import (
    Measurement,
    plot_throughput,
    throughput_table,
)


def side(factor: float) -> list[Measurement]:
    """Two phases at two batch sizes, slower by a factor."""
    return [
        Measurement("prefill", 1, 512, 1, 0.5 * factor),
        Measurement("prefill", 8, 4096, 1, 2.0 * factor),
        Measurement("decode", 1, 10, 10, 1.0 * factor),
        Measurement("decode", 8, 80, 10, 2.0 * factor),
    ]


def test_throughput_counts_all_sequences_and_latency_steps() -> None:
    decode = side(1.0)[3]
    assert decode.throughput == 40.0
    assert decode.latency == 200.0


def test_the_table_has_both_sides_and_their_ratio() -> None:
    lines = throughput_table(side(1.0), side(1.5)).splitlines()
    assert lines[2:4] == [
        "| prefill | 1 | 1024 | 683 | 500.0 | 750.0 | 1.50 |",
        "| prefill | 8 | 2048 | 1365 | 2000.0 | 3000.0 | 1.50 |",
    ]
    assert len(lines) == 6
    assert {line.count("|") for line in lines} == {8}


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    plot_throughput(side(1.0), side(1.5), tmp_path / "serve.png")
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_plot_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"\[eval\]"):
        plot_throughput(side(1.0), side(1.5), tmp_path / "serve.png")
