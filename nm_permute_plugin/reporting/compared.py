# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side: the columns of their table, and their curves overlaid."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from nm_permute_plugin.reporting.drawing import MARKS, SERIES, from_zero, new_figure
from nm_permute_plugin.reporting.layers import stacks
from nm_permute_plugin.reporting.measured import Task, Text
from nm_permute_plugin.reporting.run import Run
from nm_permute_plugin.reporting.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]
T = TypeVar("T")
R = TypeVar("R", Text, Task)


@dataclass(frozen=True)
class Table:
    """
    A table of words.

    :param lines: one a run, as many words as there are columns
    """

    columns: Sequence[str]
    lines: Sequence[Sequence[str]]


def rows(subjects: Sequence[Subject]) -> Table:
    """One line a run; columns that no run fills are left out."""
    columns: dict[str, list[str]] = {
        "checkpoint": [subject.name for subject in subjects],
        "base model": [subject.run.base_model for subject in subjects],
        "pattern": [subject.run.pattern for subject in subjects],
        "score": [subject.run.score for subject in subjects],
        "method": [_method(subject.run) for subject in subjects],
    }
    columns |= {
        "score kept": [
            _words(s.run.retained, lambda r: f"{r[1]:.1%}") for s in subjects
        ],
        "validation loss": [
            _words(s.run.losses, lambda loss: f"{loss[0]:.3f} → {loss[1]:.3f}")
            for s in subjects
        ],
    }
    for title in dict.fromkeys(r.title for s in subjects for r in s.measured.texts):
        results = [_titled(subject.measured.texts, title) for subject in subjects]
        dense = next((r.dense for r in results if r and r.dense), None)
        beside = "" if dense is None else f" (dense {dense:.2f})"
        columns[f"perplexity on {title}{beside}"] = [
            _words(r, lambda r: f"{r.perplexity:.2f}") for r in results
        ]
        gaps = [None if r is None else r.gap for r in results]
        columns[f"gap closed on {title}"] = [_words(g, "{:.1%}".format) for g in gaps]
        far = [None if r is None else r.divergence for r in results]
        columns[f"KL on {title}"] = [_words(d, "{:.3f}".format) for d in far]
    for title in dict.fromkeys(r.title for s in subjects for r in s.measured.tasks):
        values = [_titled(subject.measured.tasks, title) for subject in subjects]
        columns[title] = [_words(r, lambda r: f"{r.value:.3f}") for r in values]
    columns["minutes"] = [_words(s.run.minutes, lambda m: f"{m:.1f}") for s in subjects]
    columns["MB of weights"] = [
        _words(s.stored, lambda stored: f"{stored[0] / 1e6:,.1f}") for s in subjects
    ]
    filled = {title: words for title, words in columns.items() if any(words)}
    return Table(list(filled), list(zip(*filled.values(), strict=True)))


def overlaid(subjects: Sequence[Subject]) -> Iterator[tuple[str, "Figure"]]:
    """The curves of all runs that have them, with their titles."""
    kinds: list[tuple[str, str, str, Callable[[Run], Points]]] = [
        ("Learning", "step of the learning", "validation loss", _learning),
        ("Score lost by layer", "layer", "score lost, %", _lost),
    ]
    for title, across, up, points in kinds:
        curves = [(s.name, points(s.run)) for s in subjects]
        if sum(len(of) > 1 for _, of in curves) == 0:
            continue
        figure = new_figure(3.0 + 0.2 * len(curves))
        axes = figure.subplots()
        for number, (name, of) in enumerate(curves):
            if len(of) < 2:
                continue
            colour, mark = SERIES[number % len(SERIES)], MARKS[number % len(MARKS)]
            axes.plot(*zip(*of, strict=True), color=colour, marker=mark, label=name)
        axes.set(xlabel=across, ylabel=up)
        from_zero(axes, [value for _, of in curves for _, value in of])
        figure.legend(loc="outside lower center")
        yield title, figure


def _learning(run: Run) -> Points:
    return [(e.place, e.validation) for e in run.learned if e.validation is not None]


def _lost(run: Run) -> Points:
    found = max(
        stacks(run.figures.linears), key=lambda stack: len(stack.cells), default=None
    )
    if found is None:
        return []
    return [(layer, 100 - 100 * cell.after) for layer, cell in found.by_layer.items()]


def _method(run: Run) -> str:
    stages = [stage.stage for stage in run.recovered if stage.kept]
    return " + ".join([run.method, *stages])


def _titled(results: Sequence[R], title: str) -> R | None:
    """The newest result of a title."""
    return next((r for r in reversed(results) if r.title == title), None)


def _words(value: T | None, words: Callable[[T], str]) -> str:
    return "" if value is None else words(value)
