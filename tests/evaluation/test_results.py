# SPDX-License-Identifier: Apache-2.0
"""Results of evaluations are kept beside a checkpoint, the newest of each kind."""

from pathlib import Path

import pytest

from nm_permute_plugin.evaluation.results import (
    FILE,
    Evaluations,
    TaskResult,
    TextResult,
    read_evaluations,
    write_evaluations,
)

OLD = TextResult(text="a.txt", form="windows of 8 tokens", tokens=64, perplexity=20.0)
NEW = OLD.model_copy(update={"perplexity": 10.0})
OTHER = OLD.model_copy(update={"text": "b.txt"})
TASK = TaskResult(task="hellaswag", metric="acc", value=0.3, dense=0.4)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    results = Evaluations(texts=(OLD,), tasks=(TASK,))
    write_evaluations(tmp_path, results)
    assert read_evaluations(tmp_path) == results


def test_a_newer_result_takes_the_place_of_one_like_it() -> None:
    results = Evaluations().with_text(OLD).with_text(OTHER).with_text(NEW)
    assert results.texts == (OTHER, NEW)
    again = TASK.model_copy(update={"value": 0.35})
    assert Evaluations().with_task(TASK).with_task(again).tasks == (again,)


def test_the_same_value_again_keeps_what_it_was_compared_with() -> None:
    compared = OLD.model_copy(update={"dense": 9.0, "base": 30.0, "flips": 0.1})
    assert Evaluations().with_text(compared).with_text(OLD).texts == (compared,)
    rounded = OLD.model_copy(update={"perplexity": 20.001})
    (kept,) = Evaluations().with_text(compared).with_text(rounded).texts
    assert (kept.perplexity, kept.dense, kept.base) == (20.001, 9.0, 30.0)
    other = OLD.model_copy(update={"dense": 8.0})
    both = compared.model_copy(update={"dense": 8.0})
    assert Evaluations().with_text(compared).with_text(other).texts == (both,)
    assert Evaluations().with_text(compared).with_text(NEW).texts == (NEW,)
    alone = TASK.model_copy(update={"dense": None})
    assert Evaluations().with_task(TASK).with_task(alone).tasks == (TASK,)


def test_recovery_is_a_share_of_the_dense_model() -> None:
    assert TASK.recovery == pytest.approx(0.75)
    assert TASK.model_copy(update={"dense": None}).recovery is None


def test_no_file_is_no_result(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) == Evaluations()


@pytest.mark.parametrize("held", ["", "{", "[]", '{"texts": [{"text": 1}]}'])
def test_a_damaged_file_is_named(held: str, tmp_path: Path) -> None:
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text(held)
    with pytest.raises(ValueError, match=r"evaluations\.json holds no results"):
        read_evaluations(tmp_path)
