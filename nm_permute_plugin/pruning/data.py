# SPDX-License-Identifier: Apache-2.0
"""Calibration data: batches that train, batches that validate, and what counts in them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Batch = Mapping[str, Tensor]
"""
Keyword arguments of the model's forward, one of

- text: ``input_ids`` and, where rows are padded, ``attention_mask``, each [rows, tokens];
  where not all tokens count, ``loss_mask`` [rows, tokens] as well, which no model is given
- images: ``pixel_values`` [images, channels, height, width], and nothing else
- one sample of text with images: what the model's processor gives for it
"""

Row = Int[Tensor, " _tokens"]  # rows differ in length: the axis is not compared
Images = Float[Tensor, "_images _channels _height _width"]  # batches differ in number
LossMask = Bool[Tensor, " _tokens"]  # of a row: True for the tokens that count
Counted = Bool[Tensor, "rows tokens"] | Bool[Tensor, " images"]


@dataclass(frozen=True)
class Data:
    """
    The calibration data of a run.

    :param train: batches for statistics and for training
    :param validation: batches that only validate; none of their samples is in ``train``
    """

    train: list[Batch]
    validation: list[Batch]

    @property
    def tokens(self) -> int:
        """How many tokens there are to train on; images alone have none."""
        texts = [batch for batch in self.train if "input_ids" in batch]
        return sum(int(token_mask(batch).sum()) for batch in texts)

    def batches(self, seed: int) -> Iterator[Batch]:
        """The training batches for ever, in a new random order every epoch."""
        return (self.train[index] for index in endless(len(self.train), seed))

    def __repr__(self) -> str:
        """
        The main figures, in a line.

        >>> Data([{"pixel_values": torch.zeros(5, 3, 8, 8)}], [])
        Data(5 images to train on in 1 batches, 0 batches that validate)
        """
        return (
            f"Data({self} to train on in {len(self.train)} batches, "
            f"{len(self.validation)} batches that validate)"
        )

    def __str__(self) -> str:
        """
        What there is to train on, in words.

        >>> str(Data([{"pixel_values": torch.zeros(5, 3, 8, 8)}], []))
        '5 images'
        """
        with_images = [batch for batch in self.train if "pixel_values" in batch]
        if not with_images:
            return f"{self.tokens} tokens"
        if self.tokens:
            return f"{self.tokens} tokens and {len(with_images)} images"
        return f"{sum(len(batch['pixel_values']) for batch in with_images)} images"


def split_text(
    rows: Sequence[Row],
    batch_size: int,
    validation_share: float,
    seed: int,
    loss_masks: Sequence[LossMask] | None = None,
) -> Data:
    """
    Split rows of text into training and validation batches.

    :param batch_size: rows of a batch; shorter rows are padded on the right
    :param validation_share: the share of rows that only validate; one at least, never all
    :param loss_masks: of every row, the tokens that count; all of them if None
    :raises ValueError: if there are fewer than two rows
    """
    train, validation = split(len(rows), validation_share, seed)

    def batches(numbers: list[int]) -> list[Batch]:
        starts = range(0, len(numbers), batch_size)
        return [batch(numbers[start : start + batch_size]) for start in starts]

    def batch(numbers: list[int]) -> Batch:
        padded = _padded([rows[i] for i in numbers])
        if loss_masks is None:
            return padded
        masks = pad_sequence([loss_masks[i] for i in numbers], batch_first=True)
        return {**padded, "loss_mask": masks}

    return Data(batches(train), batches(validation))


def split_images(
    images: Images, batch_size: int, validation_share: float, seed: int
) -> Data:
    """
    Split images into training and validation batches, as ``split_text`` does rows.

    :raises ValueError: if there are fewer than two images
    """
    train, validation = split(len(images), validation_share, seed)

    def batches(numbers: list[int]) -> list[Batch]:
        return [{"pixel_values": batch} for batch in images[numbers].split(batch_size)]

    return Data(batches(train), batches(validation))


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """
    The numbers of the samples that train, and of those that validate, in random order.

    :raises ValueError: if there are fewer than two samples
    """
    if count < 2:
        raise ValueError(
            f"the calibration data has {count} row; at least 2 are needed, one to "
            "train on and one for validation. Use more samples, or shorter ones."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).tolist()
    validating = min(max(1, round(share * count)), count - 1)
    return order[validating:], order[:validating]


def endless(count: int, seed: int) -> Iterator[int]:
    """Every number below ``count`` once an epoch, in a new random order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def on_device(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch where the model's embedding lives, its pixels in the model's dtype."""
    parameter = next(model.parameters())
    return {
        name: tensor.to(
            parameter.device,
            parameter.dtype if tensor.is_floating_point() else tensor.dtype,
        )
        for name, tensor in batch.items()
    }


def forward(model: nn.Module, batch: Batch, **options: bool) -> Any:
    """Run a model on a batch that is on its device; no cache is kept for generation."""
    if "input_ids" in batch:
        options["use_cache"] = False
    inputs = {name: tensor for name, tensor in batch.items() if name != "loss_mask"}
    return model(**inputs, **options)


def first_sample(batch: Batch) -> dict[str, Tensor]:
    """The first row or image of a batch; all of a batch that is a single sample."""
    lengths = {len(tensor) for tensor in batch.values()}
    if len(lengths) > 1:  # patches of images beside tokens
        return dict(batch)
    return {name: tensor[:1] for name, tensor in batch.items()}


def token_mask(batch: Batch) -> Counted:
    """
    True for what counts: whole images, and tokens that are no padding and that the batch's
    loss mask, if it has one, does not leave out.
    """
    if "loss_mask" in batch:
        counted = batch["loss_mask"].bool()
        mask = batch.get("attention_mask")
        return counted if mask is None else counted & mask.bool()
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    if "input_ids" in batch:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    pixels = batch["pixel_values"]
    return torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)


def counted_rows(
    values: Float[Tensor, "*_any width"], mask: Counted
) -> Float[Tensor, "_counted width"]:
    """
    The vectors that count, one a row.

    All of them count where the mask has another shape: a tower of images inside of a
    language model has patches, not tokens.
    """
    if values.shape[: mask.dim()] == mask.shape:
        values = values[mask]
    elif values.shape[:-1] == (mask.numel(),):  # some layers flatten rows and tokens
        values = values[mask.flatten()]
    return values.flatten(0, -2)


def micro_batches(batch: Batch, size: int | None) -> Iterator[tuple[Batch, float]]:
    """
    The batch in parts of at most ``size`` rows, each with its share of the tokens.

    A sample of text with images cannot be split: the patches of its images have another
    leading dimension than its tokens.
    """
    counted: Tensor = token_mask(batch)
    if size is None or len(counted) <= size:
        yield batch, 1.0
        return
    for first in range(0, len(counted), size):
        rows = slice(first, first + size)
        share = float(counted[rows].sum() / counted.sum())
        yield {name: tensor[rows] for name, tensor in batch.items()}, share


def without_padding(batch: Batch) -> Iterator[Batch]:
    """
    The batch in parts that hold no padding: rows of one length are a part.

    A module that flattens its tokens, such as a router of experts, hides which of its
    inputs are padding.
    """
    if "attention_mask" not in batch or "pixel_values" in batch:
        yield batch
        return
    there = batch["attention_mask"].bool()
    if bool(there.all()):
        yield batch
        return
    lengths = there.sum(1)
    names = [name for name in ("input_ids", "loss_mask") if name in batch]
    for length in sorted(set(lengths.tolist()) - {0}):
        rows = lengths == length
        yield {x: batch[x][rows][there[rows]].view(-1, length) for x in names}


def _padded(rows: Sequence[Row]) -> Batch:
    """Rows padded on the right; the mask is left out where nothing is padded."""
    ids = pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    if bool((lengths == ids.shape[1]).all()):
        return {"input_ids": ids}
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}
