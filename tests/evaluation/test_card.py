# SPDX-License-Identifier: Apache-2.0
"""Results as the tables of a card, with the rows that are there already."""

import json
from pathlib import Path

import pytest

from nm_permute_plugin.checkpoint.card_file import read_evaluation
from nm_permute_plugin.evaluation.card import TASKS, TEXTS, keep, markdown_table, tables
from nm_permute_plugin.evaluation.results import (
    FILE,
    Evaluations,
    TaskResult,
    TextResult,
    read_evaluations,
)

TEXT = TextResult(
    text="a|b.txt",
    form="windows of 2048 tokens",
    tokens=16376,
    perplexity=20.0,
    dense=10.0,
    base=40.0,
    divergence=0.51234,
    agreement=0.7,
    flips=0.125,
)
TASK = TaskResult(
    task="hellaswag",
    metric="acc_norm",
    value=0.3,
    error=0.0102,
    items=2000,
    dense=0.4,
    dense_error=0.011,
    flips=0.2,
)
TEXT_ROW = (
    "| a/b.txt | windows of 2048 tokens | 16376 | 20.00 | 10.00 | 50.0% (from 40.00) "
    "| 0.5123 | 70.00% | 12.50% |"
)
TASK_ROW = (
    "| hellaswag | acc_norm | 2000 | 0.3000 ± 0.0102 | 0.4000 ± 0.0110 | 75.0% "
    "| 20.00% |"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a card and a record, such as a run leaves it."""
    (tmp_path / "nm_permute").mkdir()
    (tmp_path / "nm_permute" / "report.json").write_text("{}")
    card = "# A\n\n<!-- evaluation -->\n<!-- end of evaluation -->\n\nEnd.\n"
    (tmp_path / "README.md").write_text(card)
    return tmp_path


def test_what_was_measured_is_a_row() -> None:
    made = tables(Evaluations(texts=(TEXT,), tasks=(TASK,))).split("\n\n")
    assert [table.splitlines()[2:] for table in made] == [[TEXT_ROW], [TASK_ROW]]
    few = TextResult(text="c.txt", form="f", tokens=1, perplexity=2.0)
    row = "| c.txt | f | 1 | 2.00 |  |  |  |  |  |"
    assert tables(Evaluations(texts=(few,))).splitlines()[2:] == [row]


def test_recovery_is_for_metrics_where_more_is_better() -> None:
    worse = TASK.model_copy(update={"metric": "perplexity", "higher_is_better": False})
    (row,) = tables(Evaluations(tasks=(worse,))).splitlines()[2:]
    assert row.endswith("| 0.4000 ± 0.0110 |  | 20.00% |")


def test_results_are_added_and_replaced_and_the_rest_stays(folder: Path) -> None:
    keep(folder, texts=[TEXT])
    assert read_evaluation(folder) == ""
    keep(folder, tasks=[TASK], card=True)
    newer = TEXT.model_copy(update={"perplexity": 15.0})
    other = TEXT.model_copy(update={"form": "one stream"})
    keep(folder, texts=[newer, other], card=True)
    assert read_evaluations(folder) == Evaluations(texts=(newer, other), tasks=(TASK,))
    shown = read_evaluation(folder)
    assert shown.count("a/b.txt") == 2
    assert "| 15.00 |" in shown
    assert TASK_ROW in shown
    text = (folder / "README.md").read_text()
    assert text.startswith("# A\n\n<!-- evaluation -->")
    assert text.endswith("<!-- end of evaluation -->\n\nEnd.\n")


def test_rows_of_cards_whose_file_is_gone_are_kept(folder: Path) -> None:
    keep(folder, texts=[TEXT], tasks=[TASK], card=True)
    (folder / FILE).unlink()
    other = TEXT.model_copy(update={"text": "c.txt"})
    keep(folder, texts=[other], card=True)
    shown = read_evaluation(folder)
    assert TEXT_ROW in shown
    assert TASK_ROW in shown
    assert "| c.txt |" in shown


def test_an_older_card_is_read(folder: Path) -> None:
    rows = [
        ["a/b.txt", "2048", "16384", "9.00", "47.6%"],
        ["d.txt", "2048", "16384", "8.00", ""],
        ["d.txt (one stream in windows of 2048 tokens)", "2048", "16384", "7.00", ""],
    ]
    old = markdown_table(("text", "window", "tokens", "perplexity", "gap closed"), rows)
    card = f"<!-- evaluation -->\n{old}\n<!-- end of evaluation -->\n"
    (folder / "README.md").write_text(card)
    keep(folder, texts=[TEXT], card=True)
    assert read_evaluation(folder).splitlines() == [
        f"| {' | '.join(TEXTS)} |",
        "|---" * len(TEXTS) + "|",
        "| d.txt | windows of 2048 tokens | 16384 | 8.00 |  |  |  |  |  |",
        "| d.txt | one stream in windows of 2048 tokens | 16384 | 7.00 |  |  |  |  |  |",
        TEXT_ROW,
    ]


def test_other_folders_stay_as_they_are(tmp_path: Path) -> None:
    keep(tmp_path, texts=[TEXT])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"README\.md has no place"):
        keep(tmp_path, texts=[TEXT], card=True)
    assert list(tmp_path.iterdir()) == []
    keep("organisation/name", texts=[TEXT])


def test_a_damaged_file_of_results_is_named(folder: Path) -> None:
    (folder / FILE).write_text(json.dumps({"texts": 1}))
    with pytest.raises(ValueError, match=r"evaluations\.json holds no results"):
        keep(folder, tasks=[TASK])
    assert TASKS[0] not in (folder / "README.md").read_text()
