# SPDX-License-Identifier: Apache-2.0
"""Calibration data: batches that train, batches that validate, and what counts in them."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nm_permute_plugin.pruning.targets import refuse_adapters

Batch = Mapping[str, Tensor]
"""
Keyword arguments of the model's forward, one of

- text: ``input_ids`` and, where rows are padded, ``attention_mask``, each [rows, tokens]
- images: ``pixel_values`` [images, channels, height, width], and nothing else
- one sample of text with images: what the model's processor gives for it
"""

Row = Int[Tensor, " _tokens"]  # rows differ in length: the axis is not compared
Images = Float[Tensor, "_images _channels _height _width"]  # batches differ in number
Counted = Bool[Tensor, "rows tokens"] | Bool[Tensor, " images"]

FEWEST_TOKENS = 256
"""Fewer calibration tokens than this are refused: their input norms would say nothing."""


@dataclass(frozen=True)
class Data:
    """
    The calibration data of a run.

    :param train: batches for statistics and for training
    :param validation: batches that only judge; none of their samples is in ``train``
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


def read_samples(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None,
    batch_size: int = 8,
    validation_share: float = 0.1,
    seed: int = 0,
) -> Data:
    """
    Split calibration batches of any kind into training and validation batches.

    Text alone becomes rows, and images alone become images, ``batch_size`` of them a batch.
    Where any batch has both, every batch must be one sample, as llm-compressor's collators
    give it with ``batch_size=1``, and stays a batch of its own. Labels are dropped.

    :param model: a transformers model; its forward says what it takes
    :param batches: for example ``[{"input_ids": [rows, tokens]}]``
    :param validation_share: the share of samples that only judge; one at least, never all
    :param seed: of the random split
    :raises ValueError: if there is no data, if it is of another kind than the model takes,
        if it is broken, or for a model with adapters of PEFT
    """
    if batches is None:
        raise ValueError(
            "there is no calibration data: give `oneshot` a dataset (or `nm-permute "
            "prune` a --text FILE or --images FOLDER)"
        )
    refuse_adapters(model)
    kept = [_inputs(batch, model) for batch in batches]
    with_images = ["pixel_values" in batch for batch in kept]
    if not any(with_images):
        rows = rows_of(kept, _vocabulary(model))
        return split_text(rows, batch_size, validation_share, seed)
    if "input_ids" in kept[with_images.index(True)]:
        _check_single(kept, _vocabulary(model))
        train, validation = _split(len(kept), validation_share, seed)
        return Data([kept[i] for i in train], [kept[i] for i in validation])
    if not all(with_images):
        raise ValueError(
            "some calibration batches hold images alone, and some text alone; calibrate "
            "with one kind"
        )
    images = _images(batch["pixel_values"] for batch in kept)
    return split_images(images, batch_size, validation_share, seed)


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
    rows: Sequence[Row], batch_size: int, validation_share: float, seed: int
) -> Data:
    """
    Split rows of text into training and validation batches.

    :param batch_size: rows of a batch; shorter rows are padded on the right
    :param validation_share: the share of rows that only judge; one at least, never all
    :raises ValueError: if there are fewer than two rows
    """
    train, validation = _split(len(rows), validation_share, seed)

    def batches(numbers: list[int]) -> list[Batch]:
        starts = range(0, len(numbers), batch_size)
        return [_padded([rows[i] for i in numbers[s : s + batch_size]]) for s in starts]

    return Data(batches(train), batches(validation))


def split_images(
    images: Images, batch_size: int, validation_share: float, seed: int
) -> Data:
    """
    Split images into training and validation batches, as ``split_text`` does rows.

    :raises ValueError: if there are fewer than two images
    """
    train, validation = _split(len(images), validation_share, seed)

    def batches(numbers: list[int]) -> list[Batch]:
        return [{"pixel_values": batch} for batch in images[numbers].split(batch_size)]

    return Data(batches(train), batches(validation))


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
    return model(**batch, **options)


def first_sample(batch: Batch) -> dict[str, Tensor]:
    """The first row or image of a batch; all of a batch that is a single sample."""
    lengths = {len(tensor) for tensor in batch.values()}
    if len(lengths) > 1:  # patches of images beside tokens
        return dict(batch)
    return {name: tensor[:1] for name, tensor in batch.items()}


def token_mask(batch: Batch) -> Counted:
    """True for what counts: tokens that are no padding, and whole images."""
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
    counted: Tensor = token_mask(batch)
    if "attention_mask" not in batch or "pixel_values" in batch or bool(counted.all()):
        yield batch
        return
    lengths = counted.sum(1)
    for length in sorted(set(lengths.tolist()) - {0}):
        rows = lengths == length
        ids = batch["input_ids"][rows]
        yield {"input_ids": ids[counted[rows]].view(-1, length)}


def _split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """
    The numbers of the samples that train, and of those that validate, in random order.
    """
    if count < 2:
        raise ValueError(
            f"the calibration data has {count} row; at least 2 are needed, one to "
            "train on and one for validation. Use more samples, or shorter ones."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).tolist()
    judges = min(max(1, round(share * count)), count - 1)
    return order[judges:], order[:judges]


def _padded(rows: Sequence[Row]) -> Batch:
    """Rows padded on the right; the mask is left out where nothing is padded."""
    ids = pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    if bool((lengths == ids.shape[1]).all()):
        return {"input_ids": ids}
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def _inputs(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a batch that the model takes; labels are none of them."""
    takes = set(inspect.signature(type(model).forward).parameters) - {"labels"}
    for key, other in (("pixel_values", "text"), ("input_ids", "images")):
        if key in batch and key not in takes:
            raise ValueError(
                f"{type(model).__name__} takes {other} alone, but a calibration batch "
                f"holds {key}; calibrate with {other}"
            )
    if not {"input_ids", "pixel_values"} & set(batch):
        raise ValueError(
            f"a calibration batch holds {', '.join(batch) or 'nothing'}, but no "
            "input_ids and no pixel_values; process the dataset first"
        )
    return {
        name: value
        for name, value in batch.items()
        if name in takes and isinstance(value, Tensor)
    }


def _vocabulary(model: Any) -> int:
    """Rows of the model's embedding table."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except NotImplementedError as error:
        raise ValueError(
            f"{type(model).__name__} has no table of embeddings of its own; calibrate its "
            "towers one by one (CLIPVisionModel, for example)"
        ) from error


def _check_single(batches: list[dict[str, Tensor]], vocabulary: int) -> None:
    """Refuse a batch that is no single sample of tokens and pixels that the model knows."""
    for number, batch in enumerate(batches):
        ids = batch.get("input_ids")
        if ids is None or ids.dim() != 2 or len(ids) != 1:
            found = "none" if ids is None else f"shape {list(ids.shape)}"
            raise ValueError(
                f"calibration batch {number} must be one sample of text, with its images "
                f"or without: input_ids [1, tokens], got {found}. Use batch_size=1 and a "
                "data_collator that adds the axis of rows."
            )
        for token in (int(ids.min()), int(ids.max())):
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"calibration batch {number} holds token {token}, but the model knows "
                    f"only {vocabulary} tokens, from 0 on: the processor is another "
                    "model's"
                )
        if "pixel_values" in batch:
            _check_finite(batch["pixel_values"], number)


def _images(batches: Iterable[Tensor]) -> Images:
    """All images, one after the other, on the CPU."""
    images: list[Tensor] = []
    for number, pixels in enumerate(batches):
        if pixels.dim() != 4 or not pixels.is_floating_point():
            raise ValueError(
                f"calibration batch {number} holds pixel_values of shape "
                f"{list(pixels.shape)} and {pixels.dtype}; images are floats [images, "
                "channels, height, width], as the model's image processor gives them"
            )
        _check_finite(pixels, number)
        images.append(pixels.cpu())
    sizes = {tuple(pixels.shape[1:]) for pixels in images}
    if len(sizes) > 1:
        shown = ", ".join(" x ".join(map(str, size)) for size in sorted(sizes))
        raise ValueError(
            f"calibration images differ in size: {shown}; have the image processor "
            "resize or crop all of them alike"
        )
    return torch.cat(images)


def _check_finite(pixels: Tensor, number: int) -> None:
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError(f"calibration batch {number} holds pixels that are not finite")
