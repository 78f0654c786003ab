# SPDX-License-Identifier: Apache-2.0
"""Read calibration batches of any kind, as a data loader gives them, and check them."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.arguments import as_tensors, must_be_model
from nm_permute_plugin.pruning.data import (
    Batch,
    Data,
    Images,
    LossMask,
    Row,
    split,
    split_images,
    split_text,
    token_mask,
)
from nm_permute_plugin.pruning.positions import check_length
from nm_permute_plugin.pruning.targets import refuse_adapters

FEW_VALIDATION_TOKENS = 1000
"""
Fewer validation tokens than this are warned of: a mean loss over them is off by some %.
"""

FEWEST_TOKENS = 256
"""Fewer calibration tokens than this are refused: their input norms would say nothing."""


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

    Where there are several ranks, all of them get all samples: the hosts give each rank a
    share of a data set that all ranks have, or each has its own.

    Rows are cut where their ``position_ids`` begin again, so that no document sees the one
    before it. Of a batch with a ``loss_mask``, as llm-compressor knows it, all tokens are
    read, but statistics and losses count only those that it marks.

    :param model: a transformers model; its forward says what it takes
    :param batches: for example ``[{"input_ids": ids}]``, where ids are a tensor [rows,
        tokens] or [tokens], or lists of the same. What PyTorch's CPU generator draws while
        they are read, such as the order of a data loader that shuffles, depends on
        ``seed`` alone
    :param validation_share: the share of samples that only validate; one at least, never
        all
    :param seed: of the random split as well
    :raises ValueError: if there is no data, if it is of another kind than the model takes,
        if its rows are longer than the model's learned positions, if it is broken, or for
        a model with adapters of PEFT
    :raises TypeError: for what is no model, and for what are no batches
    """
    if batches is None:
        raise ValueError(
            "there is no calibration data: give `oneshot` a dataset (or `nm-permute "
            "prune` a --text FILE or --images FOLDER)"
        )
    must_be_model(model)
    refuse_adapters(model)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        kept = _of_all_ranks([_inputs(batch, model) for batch in as_tensors(batches)])
    if any("loss_mask" in batch for batch in kept):
        refuse_experts(model)
    with_images = ["pixel_values" in batch for batch in kept]
    if not any(with_images):
        text = _Text.of(kept, _vocabulary(model))
        longest = max(map(len, text.rows))
        remedy = "give `oneshot` max_seq_length={count}, or shorter rows"
        check_length(model.config, longest, remedy)
        data = split_text(
            text.rows, batch_size, validation_share, seed, text.loss_masks
        )
        if text.loss_masks is not None:
            _warn_of_few(data)
        return data
    if "input_ids" in kept[with_images.index(True)]:
        _check_single(kept, _vocabulary(model))
        train, validation = split(len(kept), validation_share, seed)
        return Data([kept[i] for i in train], [kept[i] for i in validation])
    if not all(with_images):
        raise ValueError(
            "some calibration batches hold images alone, and some text alone; calibrate "
            "with one kind"
        )
    images = _images(batch["pixel_values"] for batch in kept)
    return split_images(images, batch_size, validation_share, seed)


def _warn_of_few(data: Data) -> None:
    """Warn where a loss mask leaves little to validate on, which nobody sees otherwise."""
    count = sum(int(token_mask(batch).sum()) for batch in data.validation)
    if count < FEW_VALIDATION_TOKENS:
        rows = sum(len(batch["input_ids"]) for batch in data.validation)
        logger.warning(
            f"Of the {rows} rows for validation, {count} tokens count, fewer than "
            f"{FEW_VALIDATION_TOKENS}: which step is the best is partly chance then. Give "
            "more conversations, or write validation: {share: 0.3} into the recipe"
        )


def _of_all_ranks(own: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The batches of all ranks, once where all ranks have the same, in one order."""
    of_ranks = ranks.gathered(own)
    if all(_same(own, other) for own, other in pairwise(of_ranks)):
        return own
    batches = [batch for batches in of_ranks for batch in batches]
    if all("input_ids" in batch and len(batch["input_ids"]) == 1 for batch in batches):
        # As llm-compressor orders the rows of one process.
        batches.sort(key=lambda batch: -batch["input_ids"].shape[1])
    return batches


def _same(own: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return len(own) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(own, other, strict=True)
    )


def rows_of(batches: Iterable[Batch], vocabulary: int) -> list[Row]:
    """
    The rows of calibration batches, without their padding, each of a single document.

    :param batches: of ``input_ids`` and perhaps ``attention_mask`` and ``position_ids``, on
        any device
    :param vocabulary: rows of the model's embedding table
    :raises ValueError: if there is too little text, or a token that the model does
        not know
    """
    return _Text.of(batches, vocabulary).rows


@dataclass(frozen=True)
class _Text:
    """
    Rows of text, and of each the tokens that count.

    :param loss_masks: None if all tokens count
    """

    rows: list[Row]
    loss_masks: list[LossMask] | None

    @classmethod
    def of(cls, batches: Iterable[Batch], vocabulary: int) -> "_Text":
        """
        Read batches as ``rows_of`` does; rows in which nothing counts are left out.

        :raises ValueError: as ``rows_of``
        """
        pairs = [pair for i, batch in enumerate(batches) for pair in _pairs(batch, i)]
        pairs = [(row, mask) for row, mask in pairs if len(row) > 1]
        kept = [(row, mask) for row, mask in pairs if bool(mask.any())]
        if pairs and not kept:
            raise ValueError("loss_mask marks no token of the calibration data")
        rows, masks = [row for row, _ in kept], [mask for _, mask in kept]
        tokens, there = sum(int(mask.sum()) for mask in masks), sum(map(len, rows))
        if tokens < FEWEST_TOKENS:
            counted = f" that loss_mask marks, of {there}," if tokens < there else ""
            raise ValueError(
                f"the calibration data holds {tokens} tokens{counted} in {len(rows)} "
                f"rows; at least {FEWEST_TOKENS} are needed, and many thousands make good "
                "statistics"
            )
        for token in (min(int(r.min()) for r in rows), max(int(r.max()) for r in rows)):
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"the calibration data holds token {token}, but the model knows only "
                    f"{vocabulary} tokens, from 0 on: the tokenizer is another model's"
                )
        if tokens == there:
            return cls(rows, None)
        logger.info(f"loss_mask: {tokens} of {there} tokens count")
        return cls(rows, masks)


def _pairs(batch: Batch, number: int) -> Iterator[tuple[Row, LossMask]]:
    """The documents of a batch without padding, and of each the tokens that count."""
    batch = {name: tensor.cpu() for name, tensor in batch.items()}
    ids = batch["input_ids"]
    if ids.dim() != 2:
        raise ValueError(
            f"calibration batch {number} holds input_ids of shape {list(ids.shape)}; "
            "tokens are [rows, tokens]"
        )
    for name in ("attention_mask", "loss_mask"):
        if name in batch and batch[name].shape != ids.shape:
            raise ValueError(
                f"calibration batch {number} holds {name} of shape "
                f"{list(batch[name].shape)} for input_ids of shape {list(ids.shape)}; "
                "give one number for each token"
            )
    there = batch.get("attention_mask", torch.ones_like(ids))
    if bool((there > 1).any()):
        raise ValueError(
            f"calibration batch {number} holds an attention_mask with the number "
            f"{int(there.max())}: packed documents must come with position_ids that begin "
            "again at 0, or one a row"
        )
    counted = batch.get("loss_mask", torch.ones_like(ids))
    places = _positions(batch)
    for row, keep, marks, place in zip(ids, there.bool(), counted, places, strict=True):
        row, marks = row[keep], marks[keep].bool()
        sizes = _documents(place[keep], number)
        yield from zip(row.split(sizes), marks.split(sizes), strict=True)


def _positions(batch: Batch) -> Tensor:
    """The positions of all tokens, [rows, tokens]."""
    ids = batch["input_ids"]
    places = batch.get("position_ids", torch.arange(ids.shape[1]))
    if places.dim() == 3:  # of time, height and width, which are one for text
        places = places[0]
    # llm-compressor shortens rows, but not their positions.
    return places[..., : ids.shape[1]].expand(ids.shape)


def _documents(places: Tensor, number: int) -> list[int]:
    """How many tokens of a row each of its documents has."""
    starts = (places.diff() != 1).nonzero()[:, 0] + 1
    if bool((places[starts] != places[:1]).any()):
        raise ValueError(
            f"calibration batch {number} holds position_ids that neither count up by one "
            f"nor begin again at {int(places[0])}; give one document a row, without "
            "position_ids"
        )
    ends = [*starts.tolist(), len(places)]
    return [end - start for start, end in zip([0, *starts.tolist()], ends, strict=True)]


def refuse_experts(model: nn.Module) -> None:
    """
    See that a model can be told which tokens count.

    :raises ValueError: if it has experts
    """
    if any(".experts" in name for name, _ in model.named_modules()):
        raise ValueError(
            f"the calibration data has a loss_mask, but {type(model).__name__} deals its "
            "tokens to experts, which are not told what counts; leave out --answers-only, "
            'or remove the column (dataset.remove_columns("loss_mask"))'
        )


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
    # For us alone: which tokens count, and where a document of a row begins.
    takes |= {"loss_mask"} if "pixel_values" in batch else {"loss_mask", "position_ids"}
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
        places = batch.get("position_ids")
        if places is not None and places.dim() == 2 and bool((places.diff() < 0).any()):
            raise ValueError(
                f"calibration batch {number} holds position_ids that begin again: give "
                "one document a sample"
            )
        if "loss_mask" in batch and not bool(token_mask(batch).any()):
            raise ValueError(f"loss_mask marks no token of calibration batch {number}")


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
