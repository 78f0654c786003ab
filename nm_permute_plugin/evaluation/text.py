# SPDX-License-Identifier: Apache-2.0
"""
How text becomes tokens: rows to calibrate and train on, windows to evaluate on.

Every row and window begins as the tokenizer begins a text, as with ``<bos>``, because the
model was trained so. Conversations go through the tokenizer's chat template.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from loguru import logger
from torch import Tensor

from nm_permute_plugin.evaluation.answers import answer_marks
from nm_permute_plugin.evaluation.corpus import Corpus, spread
from nm_permute_plugin.evaluation.pretrained import tokenizer_of
from nm_permute_plugin.evaluation.records import Document

Window = Int[Tensor, " _tokens"]
"""Windows of documents differ in length."""

MarkedRow = tuple[list[int], list[bool]]
"""The tokens of a row, and for each whether it counts."""

WHOLE = 1_500_000
"""Characters that are tokenized in any case; of a longer text, as much as is used."""

GENEROUS = 8
"""Characters that hold a token, with room to spare: English has about four."""


@dataclass(frozen=True)
class Windows:
    """
    What a perplexity is measured on.

    :param tokens: how many tokens the text has; the rest that fills no window is among them
    :param form: how the text was cut, in words
    """

    windows: Sequence[Window]
    tokens: int
    form: str

    @property
    def used(self) -> int:
        """How many tokens the windows hold."""
        return sum(map(len, self.windows))


class TextTokenizer:
    """
    A checkpoint's tokenizer, and how it begins and ends a text.

    :param checkpoint: its folder, or its name on the hub, or the tokenizer itself
    :ivar begin: the special tokens that it puts before a text
    :ivar end: those that it puts behind a text, of encoders alone (``[SEP]``): a row of a
        language model seldom ends where a text does
    """

    def __init__(self, checkpoint: object) -> None:
        # Loosely typed: transformers' stubs do not know what a loaded tokenizer can do.
        self.tokenizer: Any = cast("Any", checkpoint)
        if isinstance(checkpoint, str | Path):
            self.tokenizer = tokenizer_of(checkpoint)
        probe = "a"
        plain = self._ids(probe)
        full = list(self.tokenizer(probe, verbose=False).input_ids)
        places = range(len(full) - len(plain) + 1)
        at = next((i for i in places if full[i : i + len(plain)] == plain), 0)
        self.begin: list[int] = full[:at]
        has_class_token = self.tokenizer.cls_token_id in self.begin
        self.end: list[int] = full[at + len(plain) :] if has_class_token else []

    def rows(
        self, corpus: Corpus, length: int, wanted: int | None = None
    ) -> list[list[int]]:
        """
        Cut a corpus into rows of text: all rows of a small one, enough of a large one.

        Plain text gives rows of exactly ``length`` tokens. Every document begins a row, and
        its last one may be shorter. Of a text that is far longer than ``wanted`` rows,
        pieces spread over it are tokenized, which begin at paragraphs.

        :param length: tokens of a row, special ones included
        :param wanted: how many rows will be used, of perhaps more; None for all there are
        :raises ValueError: if the corpus is empty or fills not even two rows, or if a
            conversation cannot go through the chat template
        """
        rows, rest = self.marked_rows(corpus, length, wanted)
        if len(rows) < 2:
            tokens = sum(len(ids) for ids, _ in rows) + rest
            raise ValueError(
                f"the calibration text has {tokens} tokens, fewer than two rows of "
                f"{length}: give more text or a smaller --sequence-length"
            )
        return [ids for ids, _ in rows]

    def marked_rows(
        self,
        corpus: Corpus,
        length: int,
        wanted: int | None = None,
        answers_only: bool = False,
    ) -> tuple[list[MarkedRow], int]:
        """
        Cut a corpus as ``rows`` does, into any number of rows.

        :param answers_only: mark what the assistant says in conversations alone, and leave
            out rows that hold nothing of it
        :return: the rows, and how many tokens of plain text fill no row
        :raises ValueError: if the corpus is empty, if a conversation cannot go through the
            chat template, or if the assistant's tokens cannot be told from the others
        """
        if not corpus.text.strip() and not corpus.documents:
            raise ValueError("the calibration text is empty")
        if answers_only and corpus.text.strip():
            raise ValueError(
                "--answers-only is for conversations, but there is plain text: leave it "
                "out, or give messages"
            )
        cut, rest = self._text_rows(corpus.text, self._body(length), wanted)
        rows = [(ids, [True] * len(ids)) for ids in cut]
        documents = corpus.documents
        if wanted is not None:
            documents = spread(documents, wanted)
            beginnings = self._beginnings(documents, length, wanted)
            if beginnings is not None and not answers_only:
                return rows + beginnings, rest
        for document in documents:
            rows += self._document_rows(document, length, answers_only)
        return rows, rest

    def windows(self, corpus: Corpus, length: int, stream: bool = False) -> Windows:
        """
        Cut a whole corpus into windows that do not overlap.

        :param length: tokens of a window, special ones included; those of documents may
            be shorter
        :param stream: one stream of tokens cut into windows, as the scripts of Wanda and
            SparseGPT do it: the tokenizer's beginning stands before the first window alone
        :raises ValueError: if the text fills no window
        """
        if length < 2:
            raise ValueError(f"a window needs at least 2 tokens, not {length}")
        if stream and corpus.documents:
            raise ValueError(
                f"--stream is for plain text, but {corpus.documents[0].where} is a "
                "document of its own: leave --stream out, or give a .txt file"
            )
        ids = self._ids(corpus.text)
        if stream:
            rows = _cut([*self.begin, *ids], length)
        else:
            rows = [[*self.begin, *row] for row in _cut(ids, self._body(length))]
        tokens = len(ids)
        for document in corpus.documents:
            pieces = [ids for ids, _ in self._document_rows(document, length)]
            rows += pieces
            tokens += sum(map(len, pieces))
        if not rows:
            raise ValueError(
                f"the text has {tokens} tokens, less than one window of {length}: give "
                "more text or a smaller --sequence-length"
            )
        form = self._form(corpus, length, stream)
        return Windows([torch.tensor(row) for row in rows], tokens, form)

    def _form(self, corpus: Corpus, length: int, stream: bool) -> str:
        """How text was cut, in words."""
        begin = "".join(self.tokenizer.convert_ids_to_tokens(self.begin))
        if stream:
            behind = f" that begins with {begin}" if begin else ""
            return f"one stream{behind} in windows of {length} tokens"
        behind = f" that begin with {begin}" if begin else ""
        if not corpus.documents:
            return f"windows of {length} tokens{behind}"
        count = len(corpus.documents)
        what = f"{count} document{'s' if count > 1 else ''}"
        what = f"text and {what}" if corpus.text else what
        return f"{what} in windows of up to {length} tokens{behind}"

    def _ids(self, text: str) -> list[int]:
        found = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return list(found.input_ids)

    def _ids_in_parts(self, text: str) -> list[int]:
        """
        The tokens of a text, of a long one in parts that begin at paragraphs.

        All cores tokenize parts at once; at their borders a token may differ.
        """
        if len(text) <= WHOLE:
            return self._ids(text)
        starts = range(WHOLE, len(text) - WHOLE // 2, WHOLE)
        borders = [0, *(_border(text, at, at + WHOLE // 4) for at in starts), len(text)]
        parts = [text[first:last] for first, last in pairwise(borders)]
        found = self.tokenizer(parts, add_special_tokens=False, verbose=False)
        return list(chain.from_iterable(found.input_ids))

    def _body(self, length: int) -> int:
        """Tokens of text in a row of that length."""
        special = len(self.begin) + len(self.end)
        if length <= special:
            raise ValueError(
                f"rows of {length} tokens have no room beside the {special} special tokens "
                "of the tokenizer; give a larger --sequence-length"
            )
        return length - special

    def _text_rows(
        self, text: str, body: int, wanted: int | None
    ) -> tuple[list[list[int]], int]:
        """The rows of a plain text, and how many tokens fill no row."""
        if wanted and len(text) > max(WHOLE, 2 * wanted * body * GENEROUS):
            cut, rest = self._spread_rows(text, body, wanted), 0
        else:
            ids = self._ids_in_parts(text)
            cut, rest = _cut(ids, body), len(ids) % body
        return [[*self.begin, *row, *self.end] for row in cut], rest

    def _spread_rows(self, text: str, body: int, wanted: int) -> list[list[int]]:
        """``wanted`` rows, one from the beginning of every part of a long text."""
        size = len(text) // wanted
        starts = [_border(text, i * size, i * size + size // 4) for i in range(wanted)]
        parts = zip(starts, [*starts[1:], len(text)], strict=True)
        taken = [
            text[first : min(last, first + body * GENEROUS)] for first, last in parts
        ]
        found = self.tokenizer(taken, add_special_tokens=False, verbose=False).input_ids
        rows = [list(ids[:body]) for ids in found if len(ids) >= body]
        if len(rows) < wanted:  # more characters of this text are a token
            return _cut(self._ids(text), body)
        logger.info(
            f"Tokenized {sum(map(len, taken)):,} of {len(text):,} characters: {wanted} "
            "rows spread over the text"
        )
        return rows

    def _beginnings(
        self, documents: Sequence[Document], length: int, wanted: int
    ) -> list[MarkedRow] | None:
        """
        ``wanted`` rows from the beginnings of documents that are far longer than needed;
        None for shorter ones, which are cut as a whole, and for conversations.
        """
        texts = [d for d in documents if isinstance(d.content, str)]
        there = sum(len(document.content) for document in texts)
        room = self._body(length) * GENEROUS
        if len(texts) < len(documents) or there <= max(WHOLE, 2 * wanted * room):
            return None
        each = -(-wanted // len(texts))
        rows: list[MarkedRow] = []
        for document in texts:
            short = replace(document, content=document.content[: each * room])
            rows += islice(self._document_rows(short, length), each)
        if len(rows) < wanted:  # some are short, so that others must give more
            return None
        logger.info(
            f"Tokenized the beginnings of {len(texts)} documents of {there:,} characters"
        )
        return rows

    def _document_rows(
        self, document: Document, length: int, answers_only: bool = False
    ) -> Iterator[MarkedRow]:
        """The rows of a document; one of a single token predicts nothing."""
        ids, begin = self._document_ids(document), self.begin
        marks = [True] * len(ids)
        if answers_only:
            if isinstance(document.content, str):
                raise ValueError(
                    f"--answers-only is for conversations, but {document.where} holds a "
                    "text: leave it out, or give messages"
                )
            marks = answer_marks(self.tokenizer, document, ids)
        if not isinstance(document.content, str):
            # A template writes the beginning itself, or means there to be none.
            written = bool(begin) and ids[: len(begin)] == begin
            begin = begin if written else []
            ids, marks = ids[len(begin) :], marks[len(begin) :]
        body = self._body(length) + len(self.begin) - len(begin)
        around = [not answers_only] * len(begin), [not answers_only] * len(self.end)
        for first in range(0, len(ids), body):
            row = [*begin, *ids[first : first + body], *self.end]
            counted = [*around[0], *marks[first : first + body], *around[1]]
            if len(row) > 1 and any(counted):
                yield row, counted

    def _document_ids(self, document: Document) -> list[int]:
        if isinstance(document.content, str):
            return self._ids(document.content)
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{document.where} holds messages, but the tokenizer has no chat template "
                "that turns them into text; give plain text, or the tokenizer of a chat "
                "model"
            )
        try:
            ids = self.tokenizer.apply_chat_template(
                document.content, tools=document.tools, return_dict=False
            )
        except Exception as error:  # of Jinja, or of the template's own
            raise ValueError(
                f"{document.where} does not go through the chat template: "
                f"{' '.join(str(error).split())}"
            ) from error
        return cast("list[int]", list(ids))


def _cut(ids: list[int], length: int) -> list[list[int]]:
    """Pieces of that length; the rest that fills none is left out."""
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def _border(text: str, first: int, last: int) -> int:
    """Where a paragraph begins between two places, or a line, or a word."""
    for end in ("\n\n", "\n", " "):
        found = text.find(end, first, last)
        if found >= 0 and first:
            return found + len(end)
    return first
