# SPDX-License-Identifier: Apache-2.0
"""Records of measured methods: read, merged, and shown as a table or a plot."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nm_permute_plugin.evaluation.report import gap_closed
from nm_permute_plugin.evaluation.throughput import require_matplotlib

BASE = "wanda"
"""The gap that methods close is the one it leaves."""

PROTOCOL = (
    "model",
    "train",
    "test",
    "pattern",
    "rows",
    "sequence_length",
    "window",
    "windows",
    "stream",
    "hellaswag",
    "items",
    "batch_size",
    "validation_share",
    "steps",
)
"""Arguments that must be the same for two figures to compare."""

SHORTEST_BAR = -0.3
"""Of the plot; a method far worse than the base would leave no room for the others."""

Record = dict[str, Any]
"""
What one run writes: hardware, arguments, dense (perplexity), dense_hellaswag, results.
"""


def read(path: Path) -> Record:
    """
    A record that a run wrote, perhaps before it was stopped.

    :raises ValueError: if the file holds something else
    """
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or not {"dense", "results"} <= record.keys():
        raise ValueError(f"{path} is no record of quality.py: it has no results")
    arguments = record.setdefault("arguments", {})
    # Before there was a choice, the test was one stream.
    arguments.setdefault("stream", "True")
    for name in ("hellaswag", "items"):
        arguments.setdefault(name, "None")
    return record


def write(record: Record, path: Path) -> None:
    """Leave the record at ``path``, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


def merged(records: Sequence[Record]) -> Record:
    """
    One record of all results.

    :raises ValueError: if the records differ in an argument of the protocol, or hold two
        different figures of one method and seed
    """
    first = records[0]
    results: dict[tuple[str, int], Record] = {}
    for record in records:
        check_protocol(first["arguments"], record["arguments"])
        for result in record["results"]:
            key = (result["method"], result["seed"])
            if results.setdefault(key, result) != result:
                raise ValueError(
                    f"{key[0]}, seed {key[1]}, was measured twice, with perplexity "
                    f"{results[key]['perplexity']} and {result['perplexity']}; leave "
                    "one of the files out"
                )
    names = list(dict.fromkeys(method for method, _ in results))
    order = sorted(results, key=lambda key: (names.index(key[0]), key[1]))
    return {
        "hardware": "; ".join(dict.fromkeys(r["hardware"] for r in records)),
        "arguments": first["arguments"],
        "dense": first["dense"],
        "dense_hellaswag": first.get("dense_hellaswag"),
        "results": [results[key] for key in order],
    }


def check_protocol(ours: dict[str, str], theirs: dict[str, str]) -> None:
    """
    Refuse to compare what was measured differently.

    :raises ValueError: naming the arguments that differ
    """
    differ = [
        f"{name} {ours.get(name)} and {theirs.get(name)}"
        for name in PROTOCOL
        if ours.get(name) != theirs.get(name)
    ]
    if differ:
        raise ValueError(
            f"results of different protocols do not compare: {', '.join(differ)}"
        )


def gaps(record: Record) -> dict[str, list[float]]:
    """The gap closed by every method, one figure a seed; none without the base."""
    values = _by_method(record, "perplexity")
    if BASE not in values:
        return {}
    base, dense = values[BASE][0], record["dense"]
    return {
        name: [gap_closed(value, base, dense) for value in of]
        for name, of in values.items()
        if name != BASE
    }


def table(record: Record) -> str:
    """The record as a Markdown table: means over the seeds, the gap from least to most."""
    lines = [
        "| method | seeds | perplexity | gap closed | from to | seconds | peak GiB "
        "| tokens trained on |",
        "|---|---|---|---|---|---|---|---|",
        f"| dense | | {record['dense']:.2f} | | | | | |",
    ]
    closed = gaps(record)
    columns = {
        key: _by_method(record, key)
        for key in ("perplexity", "seconds", "peak_gib", "tokens")
    }
    for name, values in columns["perplexity"].items():
        cells = [name, str(len(values)), f"{statistics.mean(values):.2f}", "", ""]
        if name in closed:
            of = closed[name]
            cells[3] = f"{statistics.mean(of):.1%}"
            cells[4] = f"{min(of):.1%} to {max(of):.1%}" if len(of) > 1 else ""
        cells.append(f"{statistics.mean(columns['seconds'][name]):.0f}")
        peak, tokens = columns["peak_gib"].get(name), columns["tokens"].get(name)
        cells.append(f"{max(peak):.1f}" if peak else "")
        cells.append(f"{max(tokens):,.0f}" if tokens else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(record: Record, path: Path) -> None:
    """
    Bars of the gap closed, with the spread over the seeds, as a picture.

    :param path: its ending says which kind of picture
    :raises ValueError: if the record does not hold the base
    :raises ModuleNotFoundError: without matplotlib
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    closed = gaps(record)
    if not closed:
        raise ValueError(f"a gap is relative to {BASE}: measure it and one more method")
    means = {name: statistics.mean(values) for name, values in closed.items()}
    names = sorted(means, key=lambda name: means[name])
    figure = Figure(figsize=(7, 0.9 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        width = max(means[name], SHORTEST_BAR)
        axes.barh(place, width, color="tab:blue" if width > 0 else "tab:gray")
        if means[name] >= SHORTEST_BAR:
            low, high = min(closed[name]), max(closed[name])
            whiskers = [[width - low], [high - width]]
            axes.errorbar(width, place, xerr=whiskers, color="black", capsize=3)
        text = f" {means[name]:.0%}"
        axes.text(max(0.0, *closed[name]), place, text, va="center")
    axes.set_yticks(range(len(names)), names)
    least = max(SHORTEST_BAR, min(0.0, *(min(of) for of in closed.values())))
    axes.set_xlim(least, max(0.5, *(max(of) for of in closed.values())) + 0.1)
    axes.axvline(0, color="black", linewidth=0.8)
    arguments = record["arguments"]
    pattern, window = arguments.get("pattern"), arguments.get("window")
    axes.set_xlabel(
        f"share of the log-perplexity gap closed, {pattern}, windows of {window}\n"
        f"0: {BASE} without a permutation; 1: dense"
    )
    figure.savefig(path)


def _by_method(record: Record, key: str) -> dict[str, list[float]]:
    """The figures called ``key``, by method; those that are missing are left out."""
    found: dict[str, list[float]] = {}
    for result in record["results"]:
        if result.get(key) is not None:
            found.setdefault(result["method"], []).append(float(result[key]))
    return found
