# SPDX-License-Identifier: Apache-2.0
"""Records of every kind of file are read alike, and as few as are needed."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from nm_permute_plugin.evaluation import data_sets
from nm_permute_plugin.evaluation.data_sets import read_data_set
from nm_permute_plugin.evaluation.data_sources import data_source
from nm_permute_plugin.evaluation.records import Document

CHAT = [{"role": "user", "content": "w05"}, {"role": "assistant", "content": "w06"}]
SHAREGPT = [{"from": "human", "value": "w05"}, {"from": "gpt", "value": "w06"}]
ROWS = [{"text": f"text {i}", "label": i} for i in range(10)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library ``datasets`` keeps what it has read; here for one test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_jsonl(folder: Path, rows: list[Any]) -> Path:
    (folder / "a.jsonl").write_text(lines(rows))
    return folder / "a.jsonl"


def as_packed(folder: Path, rows: list[Any]) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(rows).encode()))
    return folder / "a.jsonl.gz"


def as_json(folder: Path, rows: list[Any]) -> Path:
    (folder / "a.json").write_text(json.dumps(rows))
    return folder / "a.json"


def as_parquet(folder: Path, rows: list[Any]) -> Path:
    Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def as_csv(folder: Path, rows: list[Any]) -> Path:
    Dataset.from_list(rows).to_csv(folder / "a.csv")
    return folder / "a.csv"


def as_folder(folder: Path, rows: list[Any]) -> Path:
    (folder / "parts").mkdir()
    as_parquet(folder / "parts", rows)
    return folder / "parts"


def as_saved(folder: Path, rows: list[Any]) -> Path:
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def as_splits(folder: Path, rows: list[Any]) -> Path:
    test = Dataset.from_list([{"text": "a test", "label": 0}])
    parts = DatasetDict({"test": test, "train": Dataset.from_list(rows)})
    parts.save_to_disk(folder / "splits")
    return folder / "splits"


def as_arrow(folder: Path, rows: list[Any]) -> Path:
    (file,) = as_saved(folder, rows).glob("*.arrow")
    return file


TABLES = [as_arrow, as_json, as_packed, as_parquet, as_folder, as_saved, as_splits]


def read(path: object, wanted: int = 99, column: str | None = None) -> list[Any]:
    corpus = read_data_set(data_source(str(path)), wanted, column)
    return [document.content for document in corpus.documents]


@pytest.mark.parametrize("write", [as_jsonl, as_csv, *TABLES])
def test_texts_are_read_from_every_kind_of_file(
    write: Callable[[Path, list[Any]], Path], tmp_path: Path
) -> None:
    path = write(tmp_path, ROWS)
    assert read(path) == [row["text"] for row in ROWS]
    # One from every part of the file.
    assert read(path, wanted=3) == ["text 0", "text 3", "text 6"]
    corpus = read_data_set(data_source(str(path)), 3)
    place = "line 4" if write is as_jsonl else "row 3"
    assert corpus.documents[1].where == f"{path} {place}"


@pytest.mark.parametrize("write", [as_jsonl, *TABLES])
@pytest.mark.parametrize("form", ["messages", "conversations", "talk"])
def test_conversations_are_read_in_both_forms(
    write: Callable[[Path, list[Any]], Path], form: str, tmp_path: Path
) -> None:
    said = SHAREGPT if form == "conversations" else CHAT
    path = write(tmp_path, [{form: said, "id": 1}, {form: said, "id": 2}])
    assert read(path, column="talk" if form == "talk" else None) == [CHAT, CHAT]


def test_a_split_is_chosen(tmp_path: Path) -> None:
    path = as_splits(tmp_path, ROWS)
    assert read(f"{path}@test") == ["a test"]
    with pytest.raises(
        ValueError, match=r"no split valid, but test, train: give .*@te"
    ):
        read(f"{path}@valid")


def test_what_a_table_fills_with_null_is_no_part_of_a_message(tmp_path: Path) -> None:
    calls = [{"role": "assistant", "content": None, "name": "f"}]
    path = as_parquet(tmp_path, [{"messages": CHAT}, {"messages": calls}])
    assert read(path) == [CHAT, calls]


@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
def test_empty_texts_are_passed_over(
    write: Callable[[Path, list[Any]], Path], tmp_path: Path
) -> None:
    rows = [{"text": text} for text in ("", "a", None, " \n", "b", "c")]
    path = write(tmp_path, rows)
    assert read(path, wanted=2) == ["a", "b"]
    assert read(path) == ["a", "b", "c"]


def test_a_file_of_plain_text_stays_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    corpus = read_data_set(data_source(str(tmp_path / "a.txt")), 5)
    assert (corpus.text, corpus.documents) == ("one\n\ntwo", [])


@pytest.mark.parametrize("write", [as_csv, *TABLES])
def test_a_column_that_is_not_there_is_told_with_those_that_are(
    write: Callable[[Path, list[Any]], Path], tmp_path: Path
) -> None:
    path = write(tmp_path, [{"story": "a", "label": 1}])
    assert read(path, column="story") == ["a"]
    columns = "its columns are story, label: name the one .* --text-column"
    if write is not as_splits:
        with pytest.raises(ValueError, match=f"has no column messages, .*; {columns}"):
            read(path)
    with pytest.raises(ValueError, match="has no column tale; its columns are"):
        read(path, column="tale")


def bad_rows() -> list[Any]:
    return [
        ([{"text": "a"}, {"text": 5}], None, "line 2: text is a int, not a string"),
        (
            [{"tale": "a"}],
            None,
            "line 1 holds tale, but no messages, conversations or ",
        ),
        ([{"tale": 7.5}], "tale", "line 1: tale is a float, neither a string nor list"),
        ([{"messages": [{"from": "gpt"}]}], None, "every one of messages needs a role"),
    ]


@pytest.mark.parametrize(("rows", "column", "message"), bad_rows())
def test_a_record_that_is_no_text_is_named(
    rows: list[Any], column: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read(as_jsonl(tmp_path, rows), column=column)


def test_a_row_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = as_parquet(tmp_path, [{"text": 5}])
    with pytest.raises(
        ValueError, match=r"a.parquet row 0: text is a int, not a strin"
    ):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 but damaged", "cannot be read: .*[Pp]arquet"),
        ("a.parquet", b"", "cannot be read: "),
        ("a.json", b"[{'text': 1}", "cannot be read: "),
        ("a.csv", b"", "cannot be read: "),
        ("a.jsonl", b"", "is empty: it holds no record"),
        ("a.jsonl", b"\n \n", "is empty: it holds no record"),
        (
            "a.jsonl",
            b'{"text": ""}\n{"text": null}\n',
            "empty: all 2 records hold no t",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "K\xe4se"}\n', "line 2 is no UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{text\n', "line 2 is no JSON"),
        ("a.txt", b"", "is empty"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none cannot be read: .* any data files"):
        read(tmp_path / "none")


def test_a_hub_that_is_switched_off_is_told_in_one_line() -> None:
    with pytest.raises(
        ValueError, match="hub cannot be reached, and .* cache"
    ) as caught:
        read("no-organisation/no-name")
    assert "\n" not in str(caught.value)


def test_only_the_records_that_are_used_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_line, parsed = data_sets.document_of_line, []

    def count(where: str, line: str, column: str | None) -> Document:
        parsed.append(line)
        return read_line(where, line, column)

    monkeypatch.setattr(data_sets, "document_of_line", count)
    path = as_jsonl(tmp_path, [{"text": f"text {i}"} for i in range(5000)])
    assert len(read(path, wanted=4)) == len(parsed) == 4


def test_a_stream_is_read_no_further_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder stands in for the hub, which streams in the same way.
    folder, load = as_folder(tmp_path, ROWS * 20), datasets.load_dataset
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda _, **options: load(str(folder), **options)
    )
    found = read("org/name", wanted=5)
    assert len(found) == 5
    assert set(found) <= {row["text"] for row in ROWS}
    assert found == read("org/name", wanted=5)
    with pytest.raises(
        ValueError, match="has no column tale; its columns are text, la"
    ):
        read("org/name", column="tale")
    with pytest.raises(ValueError, match="cannot be read: .*valid"):
        read("org/name@valid")
