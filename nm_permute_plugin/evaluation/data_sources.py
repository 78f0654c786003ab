# SPDX-License-Identifier: Apache-2.0
"""Data sets as people have them: which one is meant, and each one's share of the rows."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[^:@/]+))?(@(?P<split>[^@]+))?"
)
"""A data set of the Hugging Face hub: ``ORGANISATION/NAME[:CONFIG][@SPLIT]``."""

KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""The suffixes of files of records, and what the library ``datasets`` calls their kinds."""

PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed files, behind the suffix of what they hold."""


@dataclass(frozen=True)
class DataSource:
    """
    A data set that was asked for.

    :param name: a file, a folder, or a name on the Hugging Face hub
    :param config: which configuration of a data set of the hub
    :param split: which split of a folder or of a data set of the hub
    :param weight: how large its share of the rows is, beside the other data sets
    """

    name: str
    config: str | None = None
    split: str | None = None
    weight: float = 1.0

    @property
    def is_local(self) -> bool:
        """Whether it is a file or a folder."""
        return Path(self.name).exists()

    @property
    def title(self) -> str:
        """What it is called beside a figure: no path of this machine."""
        return str(replace(self, name=Path(self.name).name) if self.is_local else self)

    @property
    def kind(self) -> str | None:
        """The kind of records of a file; None for plain text, and for what is no file."""
        return kind_of(Path(self.name)) if Path(self.name).is_file() else None

    def __str__(self) -> str:
        """The data set as it is asked for, without its weight."""
        config = f":{self.config}" if self.config else ""
        return self.name + config + (f"@{self.split}" if self.split else "")


def kind_of(file: Path) -> str | None:
    """
    The kind of records that a file holds by its suffix; None for plain text.

    >>> kind_of(Path("a.jsonl.gz")), kind_of(Path("notes.md"))
    ('json', None)
    """
    packed = file.suffix.lower() in PACKED
    return KINDS.get(Path(file.stem if packed else file.name).suffix.lower())


def data_source(asked: str) -> DataSource:
    """
    Read what was asked for: ``FILE``, ``FOLDER[@SPLIT]`` or ``ORGANISATION/NAME[:CONFIG]
    [@SPLIT]``, each with ``=WEIGHT`` behind it or without.

    >>> data_source("org/name:small@train=3")
    DataSource(name='org/name', config='small', split='train', weight=3.0)

    :raises FileNotFoundError: if it is no file and no folder, and no name of the hub
    :raises ValueError: for a weight that is no positive number
    """
    if Path(asked).exists():
        return DataSource(asked)
    name, equals, number = asked.rpartition("=")
    if not equals:
        return _unweighted(asked, 1.0)
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(
            f"--dataset {asked}: {number or 'nothing'} behind = is no positive number; "
            f"write the weight as in {name}=3"
        )
    return _unweighted(name, weight)


def _unweighted(asked: str, weight: float) -> DataSource:
    if Path(asked).exists():
        return DataSource(asked, weight=weight)
    folder, _, split = asked.rpartition("@")
    if folder and Path(folder).is_dir():
        return DataSource(folder, split=split or None, weight=weight)
    if Path(folder).is_file():
        raise ValueError(
            f"--dataset {asked}: {folder} is one file, which has no splits"
        )
    found = HUB_NAME.fullmatch(asked)
    if found is None or kind_of(Path(asked)) is not None:
        raise FileNotFoundError(
            f"--dataset {asked} does not exist; give a file (.jsonl, .json, .csv, "
            ".parquet, .arrow or plain text), a folder, or a data set of the Hugging "
            "Face hub as ORGANISATION/NAME[:CONFIG][@SPLIT]"
        )
    return DataSource(found["name"], found["config"], found["split"], weight)


def shares(sources: Sequence[DataSource], rows: int) -> list[int]:
    """
    Deal rows to data sets by their weights; what is left goes to the largest remainders.

    :raises ValueError: if a data set gets no row

    >>> shares([DataSource("a", weight=3.0), DataSource("b")], 10)
    [8, 2]
    """
    total = math.fsum(source.weight for source in sources)
    exact = [rows * source.weight / total for source in sources]
    dealt = [math.floor(share) for share in exact]
    order = sorted(range(len(sources)), key=lambda i: dealt[i] - exact[i])
    for i in order[: rows - sum(dealt)]:
        dealt[i] += 1
    for source, share in zip(sources, dealt, strict=True):
        if share == 0:
            raise ValueError(
                f"--dataset {source}={source.weight:g}: its share of {rows} rows is less "
                "than one; give more --samples, or another weight"
            )
    return dealt
