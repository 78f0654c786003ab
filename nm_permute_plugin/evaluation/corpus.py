# SPDX-License-Identifier: Apache-2.0
"""Read files of text: plain ones, and JSONL with a document or a conversation a line."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from nm_permute_plugin.evaluation.records import Document, document_of
from nm_permute_plugin.pruning.findings import together

T = TypeVar("T")

JSONL = ".jsonl"
"""The suffix of files that hold a JSON object a line; all others are plain text."""

EXAMPLES = 3
"""Files of a folder that are named where a file was wanted."""


@dataclass(frozen=True)
class Corpus:
    """
    What all files together hold.

    :param text: the plain files, with an empty line between them
    :param documents: the lines of the JSONL files; none of them runs on into another
    """

    text: str = ""
    documents: Sequence[Document] = ()


def read_corpus(files: Sequence[Path]) -> Corpus:
    """
    Read all files: JSONL by their suffix, the others as plain text.

    :raises FileNotFoundError: if one does not exist
    :raises ValueError: if one is a folder, is empty, or is not UTF-8, or for a line of
        JSONL that holds neither text nor a conversation; if several files are wrong,
        with a line for each
    """
    texts: list[str] = []
    documents: list[Document] = []
    contents = together(*(partial(_read, file) for file in files))
    for file, content in zip(files, contents, strict=True):
        if file.suffix.lower() == JSONL:
            documents += _documents(file, content)
        else:
            texts.append(content)
    return Corpus("\n\n".join(texts), documents)


def _read(file: Path) -> str:
    if file.is_dir():
        some = sorted(islice(file.rglob("*"), 1000))
        inside = [each for each in some if each.is_file()][:EXAMPLES]
        shown = ", ".join(map(str, inside))
        raise ValueError(
            f"text file {file} is a folder: give it as --dataset, or its files one by one"
            + (f", for example {shown}" if shown else "; it holds none")
        )
    if not file.is_file():
        raise FileNotFoundError(f"text file {file} does not exist")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {file} is no UTF-8 text: {error}") from error
    if not content.strip():
        raise ValueError(f"text file {file} is empty")
    return content


def plain_text(files: Sequence[Path]) -> str:
    """
    Read files of plain text alone, with an empty line between them.

    :raises FileNotFoundError: if one does not exist
    :raises ValueError: as ``read_corpus``, and for a JSONL file
    """
    for file in files:
        if file.suffix.lower() == JSONL:
            raise ValueError(
                f"{file} is a JSONL file, but plain text is needed here: write the "
                "text of its lines into a .txt file"
            )
    return read_corpus(files).text


def spread(items: Sequence[T], samples: int) -> list[T]:
    """Choose ``samples`` of the items at most, spread evenly."""
    import torch  # late: files are read, and refused, in a moment

    if len(items) <= samples:
        return list(items)
    chosen = torch.linspace(0, len(items) - 1, samples).long().tolist()
    return [items[i] for i in chosen]


def _documents(file: Path, content: str) -> list[Document]:
    # Not splitlines(): JSON may hold other ends of line than this one.
    lines = enumerate(content.split("\n"), 1)
    return [
        document_of_line(f"{file} line {number}", line)
        for number, line in lines
        if line.strip()
    ]


def document_of_line(where: str, line: str, column: str | None = None) -> Document:
    """
    Read a line of a JSONL file.

    :raises ValueError: as ``document_of``, and for a line that is no JSON
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    return document_of(where, value, column)
