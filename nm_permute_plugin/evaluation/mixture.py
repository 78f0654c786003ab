# SPDX-License-Identifier: Apache-2.0
"""Rows to calibrate and train on, of one text or of several data sets by their shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from nm_permute_plugin.evaluation.corpus import Corpus, spread
from nm_permute_plugin.evaluation.data_sets import read_data_set
from nm_permute_plugin.evaluation.data_sources import DataSource, shares
from nm_permute_plugin.evaluation.text import MarkedRow, TextTokenizer


@dataclass(frozen=True)
class Part:
    """
    A text or a data set, and what is taken of it.

    :param name: what it is called in logs
    :param rows: the most rows that are taken
    """

    name: str
    corpus: Corpus
    rows: int


@dataclass(frozen=True)
class Rows:
    """
    Calibration text.

    :param ids: one list of token ids a row
    :param counted: of every row, which tokens count; None if all do
    """

    ids: list[list[int]]
    counted: list[list[bool]] | None = None

    def __str__(self) -> str:
        """
        How many tokens there are, in words.

        >>> print(Rows([[1, 2, 3]], [[False, True, True]]))
        3 tokens, 2 of them the assistant's
        """
        said = f"{sum(map(len, self.ids))} tokens"
        if self.counted is None:
            return said
        return f"{said}, {sum(map(sum, self.counted))} of them the assistant's"


def read_parts(
    sources: Sequence[DataSource], samples: int, column: str | None = None
) -> list[Part]:
    """
    Read of every data set as much as its share of the rows needs.

    :param samples: the rows of all data sets together, at most
    :param column: what holds the text or the conversations; None finds it by its name
    :raises ValueError: as ``shares`` and ``read_data_set``
    """
    return [
        Part(str(source), read_data_set(source, share, column), share)
        for source, share in zip(sources, shares(sources, samples), strict=True)
    ]


def mixed_rows(
    checkpoint: str | Path,
    parts: Sequence[Part],
    length: int,
    answers_only: bool = False,
) -> Rows:
    """
    Cut every part into rows that begin as the tokenizer does, and spread those taken.

    :param length: tokens of a row; those of documents may be shorter
    :param answers_only: count what the assistant says in conversations alone
    :raises ValueError: if the text is empty or fills not even two rows, or holds nothing
        that counts
    """
    text = TextTokenizer(checkpoint)
    taken: list[MarkedRow] = []
    tokens = 0
    for part in parts:
        rows, rest = text.marked_rows(part.corpus, length, part.rows, answers_only)
        chosen = spread(rows, part.rows)
        if len(parts) > 1:
            _say(part, chosen)
        tokens += sum(len(ids) for ids, _ in rows) + rest
        taken += chosen
    if answers_only and not taken:
        raise ValueError(
            "--answers-only: the assistant says nothing in these conversations; messages "
            "need the role assistant (from: gpt in ShareGPT's form)"
        )
    if len(taken) < 2:
        raise ValueError(
            f"the calibration text has {tokens} tokens, fewer than two rows of {length}: "
            "give more text or a smaller --sequence-length"
        )
    counted = [marks for _, marks in taken] if answers_only else None
    return Rows([ids for ids, _ in taken], counted)


def _say(part: Part, chosen: Sequence[MarkedRow]) -> None:
    """Log what is taken of one of several data sets."""
    said = (
        f"{part.name}: {len(chosen)} rows, {sum(len(ids) for ids, _ in chosen)} tokens"
    )
    if len(chosen) < part.rows:
        logger.warning(f"{said}; its share is {part.rows} rows, but it holds no more")
    else:
        logger.info(said)
