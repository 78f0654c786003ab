# SPDX-License-Identifier: Apache-2.0
"""Read as many records of a data set as are needed, spread over the whole of it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from loguru import logger

from nm_permute_plugin.evaluation.corpus import (
    JSONL,
    Corpus,
    document_of_line,
    read_corpus,
)
from nm_permute_plugin.evaluation.data_sources import DataSource
from nm_permute_plugin.evaluation.records import COLUMNS, Document, document_of

STREAMED = 4
"""Records of the hub that are read for each that is used: those are drawn from them."""


def read_data_set(source: DataSource, wanted: int, column: str | None = None) -> Corpus:
    """
    Read ``wanted`` records that hold anything, each from another part of a data set.

    Of a file of plain text all is read: what is used of it is chosen later. Files and
    folders are read on the spot; a data set of the hub is streamed, from its beginning on,
    unless the hub is switched off by HF_HUB_OFFLINE, when it must lie in the cache.

    :param wanted: documents that will be used at most
    :param column: what holds the text or the conversation; None finds it by its name
    :raises ValueError: if the data set cannot be read, holds no such column or nothing in
        it, or for a record that is neither text nor a conversation
    :raises FileNotFoundError: if a file is gone
    """
    if Path(source.name).is_file() and source.kind is None:
        return read_corpus([Path(source.name)])
    records = _open(source, wanted, column)
    documents, empty = [], 0
    size = len(records)
    parts = min(wanted, size)
    for part in range(parts):
        for index in range(part * size // parts, (part + 1) * size // parts):
            document = records[index]
            if _holds_something(document):
                documents.append(document)
                break
            empty += 1
    if not documents:
        raise ValueError(
            f"--dataset {source} is empty: "
            + (f"all {size:,} records hold no text" if size else "it holds no record")
        )
    passed = f", {empty:,} empty ones passed over" if empty else ""
    logger.info(
        f"{source}: {len(documents):,} of {size:,} records, spread evenly{passed}"
    )
    return Corpus(documents=documents)


def read_data_sets(
    sources: Sequence[DataSource], wanted: int, column: str | None = None
) -> Corpus:
    """
    Read ``wanted`` records of each data set, to be measured on.

    :raises ValueError: as ``read_data_set``, and for a weight, which nothing would use
    """
    for source in sources:
        if source.weight != 1:
            raise ValueError(
                f"--dataset {source}={source.weight:g}: a weight deals rows to calibrate "
                "on; all that is given here is measured: leave it out"
            )
    read = [read_data_set(source, wanted, column) for source in sources]
    documents = [document for corpus in read for document in corpus.documents]
    return Corpus("\n\n".join(x.text for x in read if x.text), documents)


def _holds_something(document: Document) -> bool:
    content = document.content
    return bool(content.strip() if isinstance(content, str) else content)


def _open(source: DataSource, wanted: int, column: str | None) -> "_Lines | _Rows":
    if source.is_local and Path(source.name).suffix.lower() == JSONL:
        return _Lines(Path(source.name), column)
    with _said_in_one_line(source):
        rows = _load(source)
    rows = _with_text_alone(source, rows, column)
    if not hasattr(rows, "__len__"):
        # A stream of the hub: its shards and a few thousand records are shuffled.
        count = STREAMED * wanted
        with _said_in_one_line(source):
            rows = list(islice(rows.shuffle(seed=0, buffer_size=count), count))
    return _Rows(source, rows, column)


def _with_text_alone(source: DataSource, rows: Any, column: str | None) -> Any:
    """Leave out columns that are not used: images, say, would be decoded."""
    names = rows.column_names
    if not names:  # a stream may not know them, and says so at its first record
        return rows
    looked = [column] if column else COLUMNS
    if not {*looked} & {*names}:
        wanted = column or "messages, conversations or text"
        raise ValueError(
            f"--dataset {source} has no column {wanted}; its columns are "
            f"{', '.join(names)}: name the one that holds text or conversations by "
            "--text-column"
        )
    return rows.select_columns([x for x in (*looked, "tools") if x in names])


class _Lines:
    """The lines of a JSONL file that are not blank; only those asked for are parsed."""

    def __init__(self, file: Path, column: str | None) -> None:
        self.file, self.column = file, column
        self.starts: list[
            tuple[int, int]
        ] = []  # the line's number, and where it begins
        start = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    self.starts.append((number, start))
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Document:
        number, start = self.starts[index]
        where = f"{self.file} line {number}"
        with self.file.open("rb") as file:
            file.seek(start)
            line = file.readline()
        try:
            text = line.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is no UTF-8 text: {error}") from error
        return document_of_line(where, text, self.column)


class _Rows:
    """Rows of the library ``datasets``, or records of a stream."""

    def __init__(self, source: DataSource, rows: Any, column: str | None) -> None:
        self.source, self.rows, self.column = source, rows, column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Document:
        with _said_in_one_line(self.source):
            row = self.rows[index]
        return document_of(f"{self.source} row {index}", row, self.column)


def _load(source: DataSource) -> Any:
    """The rows of a data set, or a stream of them."""
    import datasets

    folder = Path(source.name)
    if source.kind is not None:
        kind, file = source.kind, str(folder.resolve())
        return datasets.load_dataset(kind, data_files=file, split="train")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = datasets.load_from_disk(source.name)
        return _split(source, saved) if isinstance(saved, dict) else saved
    streaming = not source.is_local and not datasets.config.HF_HUB_OFFLINE
    if streaming:
        logger.info(f"Reading {source} from the Hugging Face hub")
    options = {"name": source.config, "streaming": streaming}
    if source.split is not None:
        return datasets.load_dataset(source.name, split=source.split, **options)
    return _split(source, datasets.load_dataset(source.name, **options))


def _split(source: DataSource, splits: Any) -> Any:
    """The split that was asked for; else ``train``, or the only one."""
    asked = source.split or ("train" if "train" in splits or len(splits) > 1 else None)
    if asked is None:
        (only,) = splits.values()
        return only
    if asked not in splits:
        name = source.name + (f":{source.config}" if source.config else "")
        raise ValueError(
            f"there is no split {asked}, but {', '.join(splits)}: give "
            f"{name}@{next(iter(splits))}, for example"
        )
    return splits[asked]


@contextmanager
def _said_in_one_line(source: DataSource) -> Iterator[None]:
    """Have what the library says of a data set that it cannot read be one line."""
    import datasets  # sets the level of its own log

    names = ("huggingface_hub", datasets.__name__)
    libraries = [logging.getLogger(name) for name in names]
    levels = [library.level for library in libraries]
    for library in libraries:  # a line for each of five attempts, and of each file
        library.setLevel(logging.CRITICAL)
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of pyarrow, pandas, fsspec, the hub's client, ...
        if isinstance(error, ConnectionError):
            raise ValueError(
                f"--dataset {source}: the Hugging Face hub cannot be reached, and the data "
                "set is not in its cache; give a file or a folder of your own, or check "
                f"the network and HF_HUB_OFFLINE ({_words(error)})"
            ) from error
        raise ValueError(
            f"--dataset {source} cannot be read: {_words(_cause(error))}"
        ) from error
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.setLevel(level)


def _cause(error: BaseException) -> BaseException:
    """What the library's own error stands for."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__:
        error = error.__cause__
    return error


def _words(error: BaseException, limit: int = 300) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= limit else said[:limit] + " ..."
