# SPDX-License-Identifier: Apache-2.0
"""Keep what was measured beside a checkpoint, and show it in the model card."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from loguru import logger

from nm_permute_plugin.checkpoint.card_file import read_evaluation, write_evaluation
from nm_permute_plugin.checkpoint.record import FOLDER
from nm_permute_plugin.evaluation.report import gap_closed
from nm_permute_plugin.evaluation.results import (
    FILE,
    Evaluations,
    TaskResult,
    TextResult,
    read_evaluations,
    write_evaluations,
)

TEXTS = (
    "text",
    "cut into",
    "tokens",
    "perplexity",
    "dense",
    "gap closed",
    "KL divergence",
    "top-1 agreement",
    "flips",
)
TASKS = ("task", "metric", "items", "value", "dense", "recovery", "flips")

_OLDER = ("text", "window", "tokens", "perplexity", "gap closed")
"""The columns of cards that were written before there were results of tasks."""

_KEYS = {TEXTS: 2, TASKS: 2}
"""How many of the first cells tell one measurement from another."""


def keep(
    checkpoint: str | Path,
    texts: Sequence[TextResult] = (),
    tasks: Sequence[TaskResult] = (),
    card: bool = False,
) -> None:
    """
    Add results to those beside a checkpoint that we made; other folders stay untouched.

    :param card: put them into the model card as well
    :raises ValueError: if the card was asked for and is not ours, or if the results that
        are there already cannot be read
    """
    folder = Path(checkpoint)
    shown = (
        read_evaluation(folder) if card else ""
    )  # refuses before the file is written
    results = read_evaluations(folder)
    for text in texts:
        results = results.with_text(text)
    for task in tasks:
        results = results.with_task(task)
    if (folder / FOLDER / "report.json").is_file():
        try:
            write_evaluations(folder, results)
        except OSError as error:
            logger.warning(f"the results are not kept in {folder / FILE}: {error}")
    if card:
        write_evaluation(folder, tables(results, shown))


def check_keeping(checkpoint: str | Path, card: bool) -> None:
    """
    See, before anything is measured, that ``keep`` will be able to keep it.

    :raises ValueError: as ``keep``
    """
    read_evaluations(Path(checkpoint))
    if card:
        read_evaluation(Path(checkpoint))


def tables(results: Evaluations, earlier: str = "") -> str:
    """
    All results as Markdown: a table of texts, and one of tasks.

    :param earlier: the tables that the card has; their rows of other measurements stay
    """
    old = _rows(earlier)
    made = []
    for head, rows in (
        (TEXTS, [text_cells(result) for result in results.texts]),
        (TASKS, [task_cells(result) for result in results.tasks]),
    ):
        key = slice(_KEYS[head])
        known = {row[key] for row in rows}
        kept = [row for row in old[head] if row[key] not in known]
        if kept or rows:
            made.append(markdown_table(head, [*kept, *rows]))
    return "\n\n".join(made)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """
    A table in Markdown.

    >>> print(markdown_table(["a", "b"], [["1", ""]]))
    | a | b |
    |---|---|
    | 1 |  |
    """
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def text_cells(result: TextResult) -> tuple[str, ...]:
    """The cells of a result under ``TEXTS``; "" for what was not measured."""
    gap = ""
    if result.base is not None and result.dense is not None:
        closed = gap_closed(result.perplexity, result.base, result.dense)
        gap = f"{closed:.1%} (from {result.base:.2f})"
    return (
        _cell(result.text),
        _cell(result.form),
        str(result.tokens),
        f"{result.perplexity:.2f}",
        _shown(result.dense, ".2f"),
        gap,
        _shown(result.divergence, ".4f"),
        _shown(result.agreement, ".2%"),
        _shown(result.flips, ".2%"),
    )


def task_cells(result: TaskResult) -> tuple[str, ...]:
    """The cells of a result under ``TASKS``; "" for what was not measured."""
    return (
        _cell(result.task),
        _cell(result.metric),
        "" if result.items is None else str(result.items),
        _with_error(result.value, result.error),
        _with_error(result.dense, result.dense_error),
        _shown(result.recovery, ".1%"),
        _shown(result.flips, ".2%"),
    )


def _with_error(value: float | None, error: float | None) -> str:
    return _shown(value, ".4f") + ("" if error is None else f" ± {error:.4f}")


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cell(text: str) -> str:
    """Text that cannot end a cell of a table."""
    return " ".join(text.replace("|", "/").split())


def _rows(block: str) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """The rows of a card's tables by their head, older ones in today's columns."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {TEXTS: [], TASKS: []}
    head: tuple[str, ...] = ()
    for line in block.splitlines():
        if not line.startswith("|"):
            head = ()
        elif not line.strip("|- "):
            continue
        elif not head:
            head = _cells(line)
        elif head == _OLDER and len(_cells(line)) == len(_OLDER):
            found[TEXTS].append(_today(*_cells(line)))
        elif head in found:
            found[head].append(_cells(line))
    return found


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def _today(
    text: str, window: str, tokens: str, perplexity: str, gap: str
) -> tuple[str, ...]:
    """An older row in today's columns: its text said how it was cut, where unusual."""
    name, form = text, f"windows of {window} tokens"
    said = re.fullmatch(r"(.+) \(([^()]*\bwindows of [^()]*)\)", text)
    if said:
        name, form = said[1], said[2]
    return name, form, tokens, perplexity, "", gap, "", "", ""
