# SPDX-License-Identifier: Apache-2.0
"""Calibration text: rows of tokens, in batches."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nm_permute_plugin.pruning.samples import Samples, deal
from nm_permute_plugin.pruning.statistics import Batch, token_mask

Row = Int[Tensor, " _tokens"]  # rows differ in length: the axis is not compared

FEWEST_TOKENS = 256
"""Below this, input norms say nothing."""


def rows_of(batches: Iterable[Batch], vocabulary: int) -> list[Row]:
    """
    The rows of calibration batches, without their padding.

    :param batches: of ``input_ids`` and perhaps ``attention_mask``, on any device
    :param vocabulary: rows of the model's embedding table
    :raises ValueError: if there is too little text, or a token that the model does
        not know
    """
    rows: list[Row] = []
    for batch in batches:
        kept = token_mask(batch)
        rows += [
            row[mask].cpu() for row, mask in zip(batch["input_ids"], kept, strict=True)
        ]
    rows = [row for row in rows if len(row) > 1]
    tokens = sum(len(row) for row in rows)
    if tokens < FEWEST_TOKENS:
        raise ValueError(
            f"the calibration data holds {tokens} tokens in {len(rows)} rows; at least "
            f"{FEWEST_TOKENS} are needed, and many thousands make good statistics"
        )
    for token in (min(int(r.min()) for r in rows), max(int(r.max()) for r in rows)):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"the calibration data holds token {token}, but the model knows only "
                f"{vocabulary} tokens, from 0 on: the tokenizer is another model's"
            )
    return rows


def split_text(
    rows: Sequence[Row], batch_size: int, validation: float, seed: int
) -> Samples:
    """
    Deal rows into training and validation batches.

    :param batch_size: rows of a batch
    :param validation: the share of rows that only judge; at least one row, never all
    :raises ValueError: if there are fewer than two rows
    """
    train, held = deal(len(rows), validation, seed)
    return Samples(
        _batches([rows[i] for i in train], batch_size),
        _batches([rows[i] for i in held], batch_size),
    )


def _batches(rows: Sequence[Row], size: int) -> list[Batch]:
    return [_collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def _collate(rows: Sequence[Row]) -> Batch:
    """Right-padded rows; the mask is left out where nothing is padded."""
    ids = pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    if bool((lengths == ids.shape[1]).all()):
        return {"input_ids": ids}
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}
