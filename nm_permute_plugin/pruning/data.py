# SPDX-License-Identifier: Apache-2.0
"""Calibration data of any kind, as samples that its model takes."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nm_permute_plugin.pruning.samples import Samples, deal
from nm_permute_plugin.pruning.statistics import Batch
from nm_permute_plugin.pruning.text import rows_of, split_text

Images = Float[Tensor, "_images _channels _height _width"]  # batches differ in number


def read_samples(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None,
    batch_size: int,
    validation: float,
    seed: int,
) -> Samples:
    """
    Calibration batches, dealt into training and validation batches.

    Text alone becomes rows, and images alone become images, ``batch_size`` a batch. Where
    any batch has both, every batch must be one sample, as llm-compressor's collators give
    it with ``batch_size=1``, and stays a batch of its own. Labels are dropped.

    :param model: a transformers model; its forward says what it takes
    :param validation: the share of samples that only judge
    :raises ValueError: if there is no data, if it is of another kind than the model takes,
        or if it is broken
    """
    if batches is None:
        raise ValueError(
            "there is no calibration data: give `oneshot` a dataset (or `nm-permute "
            "prune` a --text FILE or --images FOLDER)"
        )
    kept = [_inputs(batch, model) for batch in batches]
    pictured = ["pixel_values" in batch for batch in kept]
    if not any(pictured):
        rows = rows_of(kept, _vocabulary(model))
        return split_text(rows, batch_size, validation, seed)
    if "input_ids" in kept[pictured.index(True)]:
        _check_single(kept, _vocabulary(model))
        train, held = deal(len(kept), validation, seed)
        return Samples([kept[i] for i in train], [kept[i] for i in held])
    if not all(pictured):
        raise ValueError(
            "some calibration batches hold images alone, and some text alone; calibrate "
            "with one kind"
        )
    return split_images(
        _images(batch["pixel_values"] for batch in kept), batch_size, validation, seed
    )


def split_images(
    images: Float[Tensor, "images channels height width"],
    batch_size: int,
    validation: float,
    seed: int,
) -> Samples:
    """
    Deal images into training and validation batches of ``batch_size``.

    :param validation: the share of images that only judge; at least one, never all
    :raises ValueError: if there are fewer than two images
    """
    train, held = deal(len(images), validation, seed)
    dealt: list[list[Batch]] = [
        [{"pixel_values": batch} for batch in images[numbers].split(batch_size)]
        for numbers in (train, held)
    ]
    return Samples(*dealt)


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
    """See that every batch is one sample whose tokens and pixels the model can take."""
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
    """All images, one after the other."""
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
