# SPDX-License-Identifier: Apache-2.0
"""Calibration text: rows of tokens, split into training and held-back batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nm_permute_plugin.training.statistics import Batch, token_mask

Row = Int[Tensor, " _tokens"]  # rows differ in length: the axis is not compared

FEWEST_TOKENS = 256
"""Below this, input norms say nothing."""


@dataclass(frozen=True)
class Text:
    """
    Batches to measure and train on, and batches that judge.

    :param train: batches of ``batch_size`` rows
    :param held_back: batches of rows that are in no training batch
    """

    train: list[Batch]
    held_back: list[Batch]

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return sum(int(token_mask(batch).sum()) for batch in self.train)


def rows_of(batches: Iterable[Batch] | None, vocabulary: int) -> list[Row]:
    """
    The rows of calibration batches, without their padding.

    :param batches: of ``input_ids`` and perhaps ``attention_mask``, on any device
    :param vocabulary: rows of the model's embedding table
    :raises ValueError: if there is no text, too little of it, or a token that the model
        does not know
    """
    if batches is None:
        raise ValueError(
            "there is no calibration data: give `oneshot` a dataset (or `nm-permute "
            "prune` a --text FILE)"
        )
    rows: list[Row] = []
    for batch in batches:
        if "input_ids" not in batch:
            raise ValueError(
                f"a calibration batch holds {', '.join(batch) or 'nothing'}, but no "
                "input_ids; tokenize the dataset first"
            )
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
    rows: Sequence[Row], batch_size: int, held_back: float, seed: int
) -> Text:
    """
    Deal rows into training and held-back batches.

    :param batch_size: rows of a batch
    :param held_back: the share of rows that only judge; at least one row, never all
    :raises ValueError: if there are fewer than two rows
    """
    if len(rows) < 2:
        raise ValueError(
            f"the calibration data has {len(rows)} row; at least 2 are needed, one to "
            "train on and one to hold back. Use more samples, or shorter ones."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    judges = min(max(1, round(held_back * len(rows))), len(rows) - 1)
    held, train = order[:judges], order[judges:]
    return Text(
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
