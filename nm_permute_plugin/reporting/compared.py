# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side: the columns of their table, and their curves overlaid."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from nm_permute_plugin.reporting.drawing import MARKS, SERIES, from_zero, new_figure
from nm_permute_plugin.reporting.layers import stacks
from nm_permute_plugin.reporting.measured import Task, Text
from nm_permute_plugin.reporting.run import Run
from nm_permute_plugin.reporting.subject import Subject
from nm_permute_plugin.reporting.table import Table, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, float]]
R = TypeVar("R", Text, Task)
LONGEST = 30
"""Characters of a run's name in a picture."""


def table(subjects: Sequence[Subject]) -> Table:
    """One column a run; what no run tells is left out."""
    columns: dict[str, list[str]] = {
        "checkpoint": [subject.name for subject in subjects],
        "base model": [subject.run.base_model for subject in subjects],
        "pattern": [subject.run.pattern for subject in subjects],
        "score": [subject.run.score for subject in subjects],
        "method": [_method(subject.run) for subject in subjects],
    }
    columns |= {
        "score kept": [
            words(s.run.retained, lambda r: f"{r[1]:.1%}") for s in subjects
        ],
        "validation loss": [words(s.run.losses, _fall) for s in subjects],
    }
    for title in dict.fromkeys(r.title for s in subjects for r in s.measured.texts):
        results = [_titled(subject.measured.texts, title) for subject in subjects]
        known = [r for r in results if r is not None]
        beside = ", ".join(f"{name} {value:.2f}" for name, value in _beside(known))
        beside = f" ({beside})" if beside else ""
        columns[f"perplexity on {title}{beside}"] = [
            words(r, lambda r: f"{r.perplexity:.2f}") for r in results
        ]
        gaps = [None if r is None else r.gap for r in results]
        columns[f"gap closed on {title}"] = [words(g, "{:.1%}".format) for g in gaps]
        far = [None if r is None else r.divergence for r in results]
        columns[f"KL on {title}"] = [words(d, "{:.3f}".format) for d in far]
    for title in dict.fromkeys(r.title for s in subjects for r in s.measured.tasks):
        values = [_titled(subject.measured.tasks, title) for subject in subjects]
        columns[title] = [words(r, lambda r: f"{r.value:.3f}") for r in values]
    columns["minutes"] = [words(s.run.minutes, lambda m: f"{m:.1f}") for s in subjects]
    columns["MB of weights"] = [
        words(s.stored, lambda stored: f"{stored[0] / 1e6:,.1f}") for s in subjects
    ]
    return Table.of(columns).turned()


def overlaid(subjects: Sequence[Subject]) -> Iterator[tuple[str, "Figure"]]:
    """Perplexities, and the curves of all runs that have them, with their titles."""
    titles = dict.fromkeys(r.title for s in subjects for r in s.measured.texts)
    for title in titles:
        yield f"Perplexity on {title}", _perplexities(subjects, title)
    kinds: list[tuple[str, str, str, Callable[[Run], Points]]] = [
        ("Learning", "step of the learning", "validation loss", _learning),
        ("Score lost by layer", "layer", "score lost, %", _lost),
    ]
    for title, across, up, points in kinds:
        curves = [(_short(s.name), points(s.run)) for s in subjects]
        if any(len(of) > 1 for _, of in curves):
            yield title, _curves(curves, across, up)


def _curves(curves: Sequence[tuple[str, Points]], across: str, up: str) -> "Figure":
    figure = new_figure(3.0 + 0.2 * len(curves))
    axes = figure.subplots()
    for number, (name, of) in enumerate(curves):
        if len(of) > 1:
            colour, mark = SERIES[number % len(SERIES)], MARKS[number % len(MARKS)]
            axes.plot(*zip(*of, strict=True), color=colour, marker=mark, label=name)
    axes.set(xlabel=across, ylabel=up)
    from_zero(axes, [value for _, of in curves for _, value in of])
    figure.legend(loc="outside lower center")
    return figure


def _perplexities(subjects: Sequence[Subject], title: str) -> "Figure":
    """The perplexities on one text, and the dense model's as a line."""
    found = [(_short(s.name), _titled(s.measured.texts, title)) for s in subjects]
    known = [(name, result) for name, result in found if result is not None]
    figure = new_figure(1.3 + 0.3 * len(known))
    axes = figure.subplots()
    for place, (_, result) in enumerate(known):
        value = result.perplexity
        axes.plot(value, place, "o", color=SERIES[0], markersize=8)
        said, shift = f"{value:.2f}", (9, 0)
        axes.annotate(
            said, (value, place), shift, textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(known)), [name for name, _ in known])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("perplexity, logarithmic")
    axes.margins(x=0.25, y=0.1)
    axes.invert_yaxis()
    axes.grid(axis="y")
    lines = _beside([result for _, result in known])
    for (name, value), colour, style in zip(
        lines, SERIES[1:], ("--", ":"), strict=False
    ):
        axes.axvline(value, color=colour, linestyle=style, label=f"{name}, {value:.2f}")
    if lines:
        figure.legend(loc="outside lower center")
    return figure


def _beside(results: Sequence[Text]) -> list[tuple[str, float]]:
    """
    The perplexities that others are compared with, with their names: of the dense model,
    and of the one that was pruned without a permutation where there is only one.
    """
    dense = {result.dense for result in results if result.dense is not None}
    plain = {result.base for result in results if result.base is not None}
    found = [("dense", min(dense))] if dense else []
    return found + [
        ("without a permutation", value) for value in plain if len(plain) == 1
    ]


def _short(name: str) -> str:
    """A name that fits into a picture: its end, where it is long."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _fall(losses: tuple[float | None, float]) -> str:
    before, after = losses
    return f"{after:.3f}" if before is None else f"{before:.3f} → {after:.3f}"


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
