# SPDX-License-Identifier: Apache-2.0
"""Rows know the gap that they close, and the table shows it."""

import pytest

from nm_permute_plugin.evaluation.report import Result, gap_closed, gap_of, markdown

DENSE = Result("dense", 10.0, 0.0, "out/dense")
WANDA = Result("wanda", 40.0, 1.26, "out/wanda", base="wanda")
SEARCH = Result("search", 20.0, 2.0, "out/search", base="wanda")
WORSE = Result("worse", 80.0, 2.0, "out/worse", base="wanda")
ROWS = [DENSE, WANDA, SEARCH, WORSE]


@pytest.mark.parametrize(
    ("ours", "gap"), [(40.0, 0.0), (10.0, 1.0), (20.0, 0.5), (80.0, -0.5), (5.0, 1.5)]
)
def test_the_gap_closed_is_a_share_of_log_perplexity(ours: float, gap: float) -> None:
    assert gap_closed(ours, base=40.0, dense=10.0) == pytest.approx(gap)


@pytest.mark.parametrize("base", [10.0, 9.0])
def test_there_is_no_gap_where_the_base_lost_nothing(base: float) -> None:
    with pytest.raises(ValueError, match="no gap to close"):
        gap_closed(12.0, base=base, dense=10.0)


def test_a_row_closes_a_share_of_the_gap_of_its_base() -> None:
    assert gap_of(SEARCH, ROWS) == pytest.approx(0.5)
    assert gap_of(WORSE, ROWS) == pytest.approx(-0.5)


@pytest.mark.parametrize("row", [DENSE, WANDA], ids=["dense", "base"])
def test_bases_close_nothing(row: Result) -> None:
    assert gap_of(row, ROWS) is None


def test_a_base_that_lost_nothing_has_no_gap() -> None:
    with pytest.raises(ValueError, match="no gap to close"):
        gap_of(SEARCH, [DENSE, Result("wanda", 9.0, 0.0, "w", base="wanda"), SEARCH])


def test_the_table_has_a_line_a_row() -> None:
    assert markdown(ROWS).splitlines() == [
        "| method | perplexity | gap closed | minutes | checkpoint |",
        "|---|---|---|---|---|",
        "| dense | 10.00 |  | 0.0 | out/dense |",
        "| wanda | 40.00 |  | 1.3 | out/wanda |",
        "| search | 20.00 | 50.0% | 2.0 | out/search |",
        "| worse | 80.00 | -50.0% | 2.0 | out/worse |",
    ]


def test_a_table_of_no_rows_is_its_head() -> None:
    assert len(markdown([]).splitlines()) == 2
