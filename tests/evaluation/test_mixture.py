# SPDX-License-Identifier: Apache-2.0
"""Rows of several texts are taken by their shares, and what is missing is said."""

import json
from pathlib import Path

import pytest
from helpers import TURNS, give_template
from loguru import logger

from nm_permute_plugin.evaluation.corpus import Corpus
from nm_permute_plugin.evaluation.data_sources import data_source
from nm_permute_plugin.evaluation.mixture import Part, mixed_rows, read_parts
from nm_permute_plugin.evaluation.records import Document


def texts(word: str, count: int, length: int = 9) -> Corpus:
    said = " ".join([word] * length)
    return Corpus(documents=[Document(f"row {i}", said) for i in range(count)])


@pytest.fixture
def said() -> list[str]:
    """What is logged."""
    lines: list[str] = []
    number = logger.add(
        lambda line: lines.append(str(line)), format="{level} {message}"
    )
    yield lines
    logger.remove(number)


def test_every_part_gives_its_share(tiny_checkpoint, said: list[str]) -> None:
    parts = [
        Part("big", texts("w05", 50), 6),
        Part("small", texts("w06", 1), 2),
        Part("prose", Corpus("w07 " * 40), 1),
    ]
    rows = mixed_rows(tiny_checkpoint(), parts, 12)
    assert [row[0] for row in rows.ids] == [5] * 6 + [6, 7]
    assert rows.counted is None
    assert str(rows) == f"{7 * 9 + 12} tokens"
    assert [line.strip() for line in said] == [
        "INFO big: 6 rows, 54 tokens",
        "WARNING small: 1 rows, 9 tokens; its share is 2 rows, but it holds no more",
        "INFO prose: 1 rows, 12 tokens",
    ]


def test_a_long_document_takes_no_others_place(tiny_checkpoint) -> None:
    documents = [*texts("w05", 1, 500).documents, *texts("w06", 3).documents]
    part = Part("a", Corpus(documents=documents), 4)
    rows = mixed_rows(tiny_checkpoint(), [part], 12)
    assert len(rows.ids) == 4


def test_two_data_sets_share_the_rows(tiny_checkpoint, tmp_path: Path) -> None:
    for name, word in (("a", "w05"), ("b", "w06")):
        lines = [json.dumps({"story": f"{word} w07 w08"})] * 40
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [data_source(f"{tmp_path}/a.jsonl=3"), data_source(f"{tmp_path}/b.jsonl")]
    rows = mixed_rows(tiny_checkpoint(), read_parts(sources, 20, "story"), 12)
    assert [row[0] for row in rows.ids] == [5] * 15 + [6] * 5


def chats(*turns: list[dict[str, str]]) -> list[Part]:
    documents = [Document(f"a line {i}", x) for i, x in enumerate(turns, 1)]
    return [Part("a", Corpus(documents=documents), 99)]


def test_answers_alone_count(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    give_template(folder, TURNS + "{% if add_generation_prompt %}w11 {% endif %}")
    ask = {"role": "user", "content": "w20 w21 w22"}
    answer = {"role": "assistant", "content": "w30 w31"}
    parts = chats([ask, answer, ask], [ask, ask], [ask, answer])
    rows = mixed_rows(folder, parts, 7, answers_only=True)
    # What holds no answer is left out: the end of the first, and all of the second.
    assert rows.ids == [[10, 20, 21, 22, 11, 30, 31]] * 2
    assert rows.counted == [[False] * 5 + [True] * 2] * 2
    assert str(rows) == "14 tokens, 4 of them the assistant's"
    with pytest.raises(ValueError, match="the assistant says nothing in these"):
        mixed_rows(folder, chats([ask, ask], [ask]), 7, answers_only=True)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (
            Corpus("w05 " * 40),
            "--answers-only is for conversations, but there is plain",
        ),
        (
            texts("w05", 4),
            "--answers-only is for conversations, but row 0 holds a text",
        ),
    ],
)
def test_text_has_no_answers(corpus: Corpus, message: str, tiny_checkpoint) -> None:
    with pytest.raises(ValueError, match=message):
        mixed_rows(tiny_checkpoint(), [Part("a", corpus, 9)], 7, answers_only=True)
