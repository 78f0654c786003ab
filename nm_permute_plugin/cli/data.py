# SPDX-License-Identifier: Apache-2.0
"""The options that say which data a command reads, and whether they go together."""

from pathlib import Path
from typing import Annotated

from typer import Option

from nm_permute_plugin.cli.common import one_kind
from nm_permute_plugin.evaluation.data_sources import DataSource, data_source

DATASET = (
    "instead of --text: a file (.jsonl, .json, .csv, .parquet, .arrow, plain text), a "
    "folder, or a data set of the Hugging Face hub, with messages, ShareGPT's "
    "conversations or text; repeatable"
)
"""What --dataset takes, for the help of every command that has it."""

TextColumn = Annotated[
    str | None,
    Option(help="Column of --dataset that holds the text or the conversations."),
]


def data_sources(
    text: list[Path] | None,
    dataset: list[str] | None,
    images: Path | None,
    text_column: str | None,
    what: str,
) -> list[DataSource]:
    """
    The data sets that are asked for, where the options go together.

    :param what: what is to be given, for the message of an error
    :raises ValueError: if there is no data, or data of two kinds
    :raises FileNotFoundError: for a data set that is none
    """
    if text_column is not None and not dataset:
        raise ValueError("--text-column is for --dataset, and there is none")
    if not dataset:
        one_kind(text, images, what)
        return []
    if text:
        raise ValueError(
            "--text and --dataset are two ways to say the same; give files of text as "
            "--dataset FILE.txt beside others"
        )
    if images is not None:
        raise ValueError(
            "--dataset and --images are for different models; give one of them"
        )
    return [data_source(asked) for asked in dataset]
