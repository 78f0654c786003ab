# SPDX-License-Identifier: Apache-2.0
"""Files of text are read whole, and what is wrong with a line is said with its number."""

import json
from pathlib import Path

import pytest

from nm_permute_plugin.evaluation.corpus import plain_text, read_corpus

CHAT = [{"role": "user", "content": "w05"}, {"role": "assistant", "content": "w06"}]


def jsonl(folder: Path, *lines: object, name: str = "data.jsonl") -> Path:
    path = folder / name
    shown = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(shown) + "\n", encoding="utf-8")
    return path


def test_plain_files_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.md")]
    for file in files:
        file.write_text(f"text of {file.name}")
    assert read_corpus(files).text == "text of a.txt\n\ntext of b.md"
    assert read_corpus(files).documents == []
    assert plain_text(files) == read_corpus(files).text
    assert read_corpus([]).text == ""


def test_lines_are_texts_or_conversations(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    file = jsonl(
        tmp_path,
        {"text": "line\u2028end", "id": 7},
        "",
        {"messages": CHAT, "tools": tools},
        {"messages": CHAT, "text": "the same again"},
    )
    plain = tmp_path / "a.txt"
    plain.write_text("plain")
    corpus = read_corpus([plain, file])
    assert corpus.text == "plain"
    first, second, third = corpus.documents
    assert (first.where, first.content) == (f"{file} line 1", "line\u2028end")
    assert (second.where, second.content) == (f"{file} line 3", CHAT)
    assert (second.tools, third.tools) == (tools, None)
    assert third.content == CHAT


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "line 2 is no JSON"),
        ("[" * 100_000, "line 2 is no JSON"),
        (["text"], "line 2 holds list, but no messages, conversations or text"),
        ({"prompt": "a", "answer": "b"}, "line 2 holds prompt, answer, but no mess"),
        ({}, "line 2 holds nothing, but no messages"),
        ({"text": 5}, "line 2: text is a int, not a string"),
        ({"messages": "hello"}, "line 2: messages is a str, no list of messages"),
        ({"messages": []}, "line 2: messages is an empty list of messages"),
        (
            {"messages": [{"content": "a"}]},
            "line 2: every one of messages needs a role",
        ),
        ({"messages": ["hello"]}, "line 2: every one of messages needs a role"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    file = jsonl(tmp_path, {"text": "good"}, line)
    with pytest.raises(ValueError, match=f"{file} {message}") as caught:
        read_corpus([file])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_files_that_hold_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.txt does not exist"):
        read_corpus([tmp_path / "none.txt"])
    blank, other = tmp_path / "blank.jsonl", tmp_path / "latin.txt"
    blank.write_text("\n \n")
    other.write_bytes("Käse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"blank.jsonl is empty"):
        read_corpus([blank])
    with pytest.raises(ValueError, match=r"latin.txt is no UTF-8 text"):
        read_corpus([other])


def test_where_plain_text_is_needed_lines_of_json_are_refused(tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"text": "good"})
    with pytest.raises(ValueError, match=r"data.jsonl is a JSONL file, but plain text"):
        plain_text([file])
