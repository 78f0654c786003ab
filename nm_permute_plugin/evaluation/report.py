# SPDX-License-Identifier: Apache-2.0
"""Compare the results of methods, and show them as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """
    One method's result.

    :param minutes: the time of pruning, without evaluation
    :param where: the checkpoint's folder
    :param base: the method whose gap this one closes; None for the dense model
    """

    method: str
    perplexity: float
    minutes: float
    where: str
    base: str | None = None


def gap_closed(ours: float, base: float, dense: float) -> float:
    """
    Return the share of what pruning costs ``base`` that it does not cost ``ours``.

    The cost is counted in log-perplexity.

    :param ours: the perplexity of the method that is measured
    :param base: the perplexity of the same score and pattern, in the order as it is
    :param dense: the perplexity of the model before pruning
    :raises ValueError: if ``base`` lost nothing, so that there is no gap

    >>> round(gap_closed(ours=20.0, base=40.0, dense=10.0), 3)
    0.5
    """
    if base <= dense:
        raise ValueError(
            f"there is no gap to close: the base's perplexity {base:.2f} is not above the "
            f"dense model's {dense:.2f}; the base is the checkpoint that was pruned "
            "without a permutation"
        )
    return (math.log(base) - math.log(ours)) / (math.log(base) - math.log(dense))


def gap_of(row: Result, rows: Sequence[Result]) -> float | None:
    """Return the gap that a row closes; None for a base and for the dense model."""
    if row.base is None or row.base == row.method:
        return None
    by_name = {other.method: other for other in rows}
    dense = next(other for other in rows if other.base is None)
    return gap_closed(row.perplexity, by_name[row.base].perplexity, dense.perplexity)


def markdown(rows: Sequence[Result]) -> str:
    """
    Write the rows as a Markdown table.

    >>> print(markdown([Result("dense", 10.0, 0.0, "dense")]))
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
