# SPDX-License-Identifier: Apache-2.0
"""Results as rows and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from nm_permute_plugin.evaluation.perplexity import gap_closed


@dataclass(frozen=True)
class Row:
    """
    One method's result.

    :param base: the row whose gap this one closes; None for the dense model
    :param minutes: of pruning, evaluation left out
    :param where: the checkpoint's folder
    """

    method: str
    perplexity: float
    minutes: float
    where: str
    base: str | None = None


def gap_of(row: Row, rows: Sequence[Row]) -> float | None:
    """The gap that a row closes, relative to its base; None for a base and for dense."""
    if row.base is None or row.base == row.method:
        return None
    by_name = {other.method: other for other in rows}
    dense = next(other for other in rows if other.base is None)
    return gap_closed(row.perplexity, by_name[row.base].perplexity, dense.perplexity)


def markdown(rows: Sequence[Row]) -> str:
    """
    The rows as a Markdown table.

    >>> print(markdown([Row("dense", 10.0, 0.0, "dense")]))
    | method | perplexity | gap closed | minutes | checkpoint |
    |---|---|---|---|---|
    | dense | 10.00 |  | 0.0 | dense |
    """
    lines = [
        "| method | perplexity | gap closed | minutes | checkpoint |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        gap = gap_of(row, rows)
        shown = "" if gap is None else f"{gap:.1%}"
        lines.append(
            f"| {row.method} | {row.perplexity:.2f} | {shown} | {row.minutes:.1f} "
            f"| {row.where} |"
        )
    return "\n".join(lines)
