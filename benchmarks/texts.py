# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens from text files, as all benchmarks of learning take them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from nm_permute_plugin.evaluation.corpus import read_corpus
from nm_permute_plugin.evaluation.text import TextTokenizer, Window
from nm_permute_plugin.pruning.data import Row


def text_rows(
    model: Path, files: Sequence[Path], count: int, sequence_length: int
) -> list[Row]:
    """
    Rows of the text in a fixed random order, so that all files mix; at most so many.

    :raises ValueError: if the text fills not even two rows
    """
    rows = TextTokenizer(model).rows(read_corpus(files), sequence_length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [torch.tensor(rows[i]) for i in order[:count].tolist()]


def text_windows(
    model: Path, files: Sequence[Path], window: int, stream: bool, count: int | None
) -> list[Window]:
    """
    Windows of the text, as ``nm-permute evaluate`` cuts them; the first ``count`` of them.

    :param stream: cut one stream of tokens, as ``evaluate --stream``
    :raises ValueError: if the text fills no window
    """
    cut = TextTokenizer(model).windows(read_corpus(files), window, stream)
    print(f"tested on {cut.form}")
    return list(cut.windows[:count])
