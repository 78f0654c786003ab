# SPDX-License-Identifier: Apache-2.0
"""Rows and windows begin as the tokenizer begins a text, and hold every token once."""

from pathlib import Path

import pytest
import torch
from helpers import TURNS, begin_texts_with, give_template
from torch import Tensor

from nm_permute_plugin.evaluation import text
from nm_permute_plugin.evaluation.corpus import Corpus, Document
from nm_permute_plugin.evaluation.text import TextTokenizer, Windows

BEGIN, END = 3, 4


@pytest.fixture
def plain(tiny_checkpoint) -> TextTokenizer:
    """Of a tokenizer that adds nothing."""
    return TextTokenizer(tiny_checkpoint())


@pytest.fixture
def begins(tiny_checkpoint) -> TextTokenizer:
    """Of a tokenizer that puts w03 before every text."""
    folder = tiny_checkpoint()
    begin_texts_with(folder, "w03")
    return TextTokenizer(folder)


def numbers(count: int) -> list[int]:
    return [5 + i % 40 for i in range(count)]


def words(ids: list[int]) -> str:
    return " ".join(f"w{i:02}" for i in ids)


def lists(windows: Windows) -> list[list[int]]:
    return [window.tolist() for window in windows.windows]


def chat(*said: str, where: str = "chat.jsonl line 1") -> Document:
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(said)
    ]
    return Document(where, turns)


def test_a_tokenizer_that_adds_nothing_gives_the_stream_as_it_is(
    plain: TextTokenizer,
) -> None:
    ids = numbers(70)
    corpus = Corpus(words(ids))
    assert plain.rows(corpus, 20, 99) == [ids[:20], ids[20:40], ids[40:60]]
    cut = plain.windows(corpus, 20)
    assert lists(cut) == plain.rows(corpus, 20, 99)
    assert (cut.form, cut.tokens, cut.used) == ("windows of 20 tokens", 70, 60)
    assert cut.windows[0].dtype == torch.int64
    stream = plain.windows(corpus, 20, stream=True)
    assert lists(stream) == lists(cut)
    assert stream.form == "one stream in windows of 20 tokens"


def test_rows_and_windows_begin_as_the_tokenizer_begins_a_text(
    begins: TextTokenizer,
) -> None:
    ids = numbers(70)
    corpus = Corpus(words(ids))
    expected = [[BEGIN, *ids[i : i + 19]] for i in (0, 19, 38)]
    assert begins.rows(corpus, 20, 99) == expected
    cut = begins.windows(corpus, 20)
    assert lists(cut) == expected
    assert cut.form == "windows of 20 tokens that begin with w03"
    assert (cut.tokens, cut.used) == (70, 60)


def test_a_stream_begins_once(begins: TextTokenizer) -> None:
    ids = numbers(70)
    cut = begins.windows(Corpus(words(ids)), 20, stream=True)
    whole = [BEGIN, *ids]
    assert lists(cut) == [whole[i : i + 20] for i in (0, 20, 40)]
    assert cut.form == "one stream that begins with w03 in windows of 20 tokens"


def test_an_encoder_sees_both_ends_of_a_text(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    begin_texts_with(folder, "w03", last="w04")
    ids = numbers(40)
    rows = TextTokenizer(folder).rows(Corpus(words(ids)), 20, 99)
    assert rows == [[BEGIN, *ids[:18], END], [BEGIN, *ids[18:36], END]]


def test_what_a_language_model_ends_a_text_with_stays_out_of_rows(
    tiny_checkpoint,
) -> None:
    folder = tiny_checkpoint()
    begin_texts_with(folder, "w03", last="w04")
    tokenizer = TextTokenizer(folder).tokenizer
    tokenizer.cls_token = None
    tokenizer.save_pretrained(folder)
    ids = numbers(40)
    rows = TextTokenizer(folder).rows(Corpus(words(ids)), 20, 99)
    assert rows == [[BEGIN, *ids[:19]], [BEGIN, *ids[19:38]]]


def test_every_document_begins_a_row_of_its_own(begins: TextTokenizer) -> None:
    ids = numbers(45)
    documents = [
        Document("a line 1", words(ids)),
        Document("a line 2", words([7, 8])),
        Document("a line 3", ""),
    ]
    expected = [
        [BEGIN, *ids[:19]], [BEGIN, *ids[19:38]], [BEGIN, *ids[38:]], [BEGIN, 7, 8]
    ]  # fmt: skip
    assert begins.rows(Corpus(documents=documents), 20, 99) == expected
    cut = begins.windows(Corpus(documents=documents), 20)
    assert lists(cut) == expected
    assert cut.form == "3 documents in windows of up to 20 tokens that begin with w03"
    assert cut.used == cut.tokens == sum(map(len, expected))


def test_text_and_documents_mix(plain: TextTokenizer) -> None:
    corpus = Corpus(words(numbers(20)), [Document("a line 1", "w07 w08")])
    expected = [numbers(20)[:10], numbers(20)[10:], [7, 8]]
    assert plain.rows(corpus, 10, 99) == expected
    cut = plain.windows(corpus, 10)
    assert lists(cut) == expected
    assert cut.form == "text and 1 document in windows of up to 10 tokens"


def test_conversations_go_through_the_chat_template(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    give_template(folder, TURNS)
    corpus = Corpus(documents=[chat("w20 w21", "w30"), chat("w22", "w31 w32")])
    rows = TextTokenizer(folder).rows(corpus, 20, 99)
    assert rows == [[10, 20, 21, 11, 30], [10, 22, 11, 31, 32]]


@pytest.mark.parametrize("written", [True, False])
def test_a_long_conversation_goes_on_as_its_template_begins(
    tiny_checkpoint, written: bool
) -> None:
    folder = tiny_checkpoint()
    begin_texts_with(folder, "w03")
    give_template(folder, ("w03 " if written else "") + TURNS)
    rows = TextTokenizer(folder).rows(
        Corpus(documents=[chat("w20 w21 w22", "w30 w31")]), 4, 99
    )
    whole = [10, 20, 21, 22, 11, 30, 31]
    if written:
        assert rows == [[BEGIN, *whole[i : i + 3]] for i in (0, 3, 6)]
    else:
        assert rows == [whole[:4], whole[4:]]


def test_a_conversation_without_a_template_is_refused(plain: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=r"chat.jsonl line 1 holds messages, but the "):
        plain.rows(Corpus(documents=[chat("w20", "w21")]), 20, 99)


def test_what_the_template_refuses_is_named(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    give_template(folder, "{{ raise_exception('roles must alternate') }}")
    documents = [chat("w20", where="chat.jsonl line 8")]
    with pytest.raises(ValueError, match=r"chat.jsonl line 8 does .*must alternate"):
        TextTokenizer(folder).windows(Corpus(documents=documents), 20)


def test_documents_are_no_stream(plain: TextTokenizer) -> None:
    corpus = Corpus(words(numbers(40)), [Document("a.jsonl line 1", "w07 w08")])
    with pytest.raises(ValueError, match=r"--stream is for plain text, but a.jsonl"):
        plain.windows(corpus, 20, stream=True)


@pytest.mark.parametrize("length", [1, 0, -4])
def test_a_window_that_predicts_nothing_is_refused(
    plain: TextTokenizer, length: int
) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        plain.windows(Corpus("w05 w06"), length)


def test_a_text_that_fills_no_window_is_refused(begins: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="has 9 tokens, less than one window of 11"):
        begins.windows(Corpus(words(numbers(9))), 11)
    assert len(begins.windows(Corpus(words(numbers(9))), 10).windows) == 1


def test_rows_without_room_for_text_are_refused(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    begin_texts_with(folder, "w03", last="w04")
    with pytest.raises(ValueError, match="no room beside the 2 special tokens"):
        TextTokenizer(folder).rows(Corpus(words(numbers(50))), 2, 99)


class Counted:
    """A tokenizer that tells how much it was given."""

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)

    def __call__(self, given: str | list[str], **options: object) -> object:
        texts = [given] if isinstance(given, str) else given
        self.characters += sum(map(len, texts))
        return self.tokenizer(given, **options)


@pytest.fixture
def long_text(chain_rows) -> str:
    """Paragraphs of 30 tokens, each of which begins with w47 as no other place does."""
    rows: Tensor = chain_rows(400, 29, seed=5).clamp(5, 46)
    return "\n\n".join(words([47, *row.tolist()]) for row in rows)


def test_of_a_long_text_only_what_is_used_is_tokenized(
    begins: TextTokenizer, long_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "WHOLE", 2000)
    begins.tokenizer = counted = Counted(begins.tokenizer)
    rows = begins.rows(Corpus(long_text), 24, wanted=4)
    assert counted.characters < len(long_text) / 10
    assert len(rows) == 4
    assert {len(row) for row in rows} == {24}
    # Each begins at a paragraph, and they come from all four quarters of the text.
    assert {tuple(row[:2]) for row in rows} == {(BEGIN, 47)}
    places = [long_text.index(words(row[1:])) for row in rows]
    assert [4 * place // len(long_text) for place in places] == [0, 1, 2, 3]


def test_all_of_a_long_text_is_tokenized_where_much_is_used(
    plain: TextTokenizer, long_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = plain.rows(Corpus(long_text), 24, wanted=300)
    monkeypatch.setattr(text, "WHOLE", 2000)
    assert plain.rows(Corpus(long_text), 24, wanted=300) == every
    assert len(every) == 500


def test_a_long_text_of_few_tokens_still_gives_the_rows(
    plain: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "WHOLE", 2000)
    spaced = (" " * 100).join(f"w{i:02}" for i in numbers(400))
    assert len(plain.rows(Corpus(spaced), 20, wanted=4)) == 20


def test_a_text_is_read_by_the_folder_of_a_checkpoint(
    trained_checkpoint: Path,
) -> None:
    assert TextTokenizer(trained_checkpoint).begin == []
    assert TextTokenizer(str(trained_checkpoint)).end == []


def test_of_long_documents_only_beginnings_are_tokenized(
    begins: TextTokenizer, chain_rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = chain_rows(6, 600, seed=5).clamp(5, 46)
    long = [Document(f"row {i}", words(row.tolist())) for i, row in enumerate(rows)]
    monkeypatch.setattr(text, "WHOLE", 2000)
    counted = Counted(begins.tokenizer)
    begins.tokenizer = counted
    found = begins.rows(Corpus(documents=long), 24, wanted=3)
    # Three documents, spread over the six, and 23 tokens of each behind w03.
    assert found == [[BEGIN, *rows[i, :23].tolist()] for i in (0, 2, 5)]
    assert counted.characters <= 3 * 23 * text.GENEROUS
    # Where some have too little, the others give more.
    short = [Document("row 7", "w05"), *long[:1], Document("row 8", "")]
    assert len(begins.rows(Corpus(documents=short), 24, wanted=3)) == 27 + 1
