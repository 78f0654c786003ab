# SPDX-License-Identifier: Apache-2.0
"""Which data set is meant, and how rows are dealt to several."""

from pathlib import Path

import pytest

from nm_permute_plugin.evaluation.data_sources import DataSource, data_source, shares


def test_files_folders_and_names_of_the_hub_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/local").mkdir(parents=True)
    for name in ("a.jsonl", "odd=2"):
        Path(name).write_text("{}")
    expected = {
        "a.jsonl": DataSource("a.jsonl"),
        "a.jsonl=0.5": DataSource("a.jsonl", weight=0.5),
        "odd=2": DataSource("odd=2"),
        "odd=2=3": DataSource("odd=2", weight=3.0),
        "org/local": DataSource("org/local"),
        "org/local@test=2": DataSource("org/local", split="test", weight=2.0),
        "org/far": DataSource("org/far"),
        "org/far:en.small@train[:10]=2": DataSource(
            "org/far", "en.small", "train[:10]", 2.0
        ),
    }
    assert {asked: data_source(asked) for asked in expected} == expected
    assert str(data_source("org/far:en@test=2")) == "org/far:en@test"
    assert [data_source(x).is_local for x in ("org/local", "org/far")] == [True, False]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("none.jsonl", "--dataset none.jsonl does not exist; give a file"),
        ("data/none.parquet", "data/none.parquet does not exist"),
        ("imdb", "imdb does not exist; .* ORGANISATION/NAME"),
        ("org/name:", "org/name: does not exist"),
        ("a.jsonl=", "nothing behind = is no positive number; .* a.jsonl=3"),
        ("a.jsonl=-1", "-1 behind = is no positive number"),
        ("a.jsonl=inf", "inf behind = is no positive number"),
        ("a.jsonl=many", "many behind = is no positive number"),
        ("a.jsonl@test", "a.jsonl is one file, which has no splits"),
    ],
)
def test_what_is_none_of_them_is_refused(
    asked: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("{}")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        data_source(asked)


@pytest.mark.parametrize(
    ("weights", "rows", "expected"),
    [
        ([1.0], 512, [512]),
        ([1.0, 1.0, 1.0], 512, [171, 171, 170]),
        ([3.0, 1.0], 512, [384, 128]),
        ([0.2, 0.1, 0.7], 10, [2, 1, 7]),
        ([1.0, 1.0], 2, [1, 1]),
    ],
)
def test_rows_are_dealt_by_weight_and_none_is_lost(
    weights: list[float], rows: int, expected: list[int]
) -> None:
    sources = [DataSource("org/name", weight=weight) for weight in weights]
    assert shares(sources, rows) == expected
    assert sum(expected) == rows


def test_a_share_of_no_row_is_refused() -> None:
    sources = [DataSource("org/big"), DataSource("org/small", weight=0.0001)]
    with pytest.raises(
        ValueError, match=r"org/small=0.0001: its share of 512 rows is l"
    ):
        shares(sources, 512)
