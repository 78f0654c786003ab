# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens from text files, as all benchmarks of learning take them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from nm_permute_plugin.evaluation.perplexity import tokenize
from nm_permute_plugin.pruning.data import Row


def text_rows(
    model: Path, files: Sequence[Path], count: int, sequence_length: int
) -> list[Row]:
    """
    Rows of the text in a fixed random order, so that all files mix; at most so many.

    :raises ValueError: if the text fills no row
    """
    tokens = tokenize(model, "\n\n".join(file.read_text() for file in files))
    there = len(tokens) // sequence_length
    if there == 0:
        raise ValueError(
            f"{', '.join(map(str, files))}: {len(tokens)} tokens fill no row of "
            f"{sequence_length}; give more text or a smaller --sequence-length"
        )
    rows = tokens[: there * sequence_length].view(there, -1)
    order = torch.randperm(there, generator=torch.Generator().manual_seed(0))
    return list(rows[order[:count]])
