# SPDX-License-Identifier: Apache-2.0
"""Run a recipe on a model folder and leave a finished checkpoint, or nothing."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from llmcompressor import oneshot, reset_session
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoTokenizer

from nm_permute_plugin.checkpoint.transaction import directory, refuse_occupied
from nm_permute_plugin.evaluation.images import image_processor, pixels
from nm_permute_plugin.evaluation.loading import model_class
from nm_permute_plugin.evaluation.perplexity import tokenize
from nm_permute_plugin.modifiers.recipe import read_recipe


def prune_checkpoint(
    model: str | Path,
    recipe: Path,
    out: Path,
    rows: Sequence[Sequence[int]],
    device: str | None = None,
) -> float:
    """
    ``oneshot`` with a recipe, into a folder that appears only when all went well.

    :param rows: calibration text, one list of token ids a row
    :param device: where the model runs; the first CUDA device if there is one
    :return: minutes from loading to saving
    :raises ValueError: for a recipe that llm-compressor would not read completely
    :raises FileExistsError: if ``out`` holds files already
    :raises OSError: if ``out`` cannot be written
    """

    def data() -> dict[str, Any]:
        return {
            "tokenizer": AutoTokenizer.from_pretrained(model),
            "dataset": Dataset.from_dict({"input_ids": [list(row) for row in rows]}),
            "max_seq_length": max(map(len, rows)),
            "num_calibration_samples": len(rows),
            "shuffle_calibration_samples": False,
        }

    return _prune(model, recipe, out, data, device)


def prune_with_images(
    model: str | Path,
    recipe: Path,
    out: Path,
    files: Sequence[Path],
    device: str | None = None,
) -> float:
    """
    ``prune_checkpoint`` for a model of images.

    :param files: pictures to calibrate and train on
    :raises ValueError: as well, for a picture that cannot be read
    """

    def data() -> dict[str, Any]:
        processor = image_processor(model)
        batches = [{"pixel_values": p} for p in pixels(processor, files, batch_size=32)]
        loader = DataLoader(cast("TorchDataset[Any]", batches), batch_size=None)
        return {"processor": processor, "dataset": loader}

    return _prune(model, recipe, out, data, device)


def spread(files: Sequence[Path], samples: int) -> list[Path]:
    """``samples`` of the files at most, spread evenly."""
    if len(files) <= samples:
        return list(files)
    chosen = torch.linspace(0, len(files) - 1, samples).long().tolist()
    return [files[i] for i in chosen]


def _prune(
    model: str | Path,
    recipe: Path,
    out: Path,
    data: Callable[[], dict[str, Any]],
    device: str | None,
) -> float:
    """``oneshot`` into a folder that appears only when all went well; minutes."""
    read_recipe(recipe)
    out = out.resolve()
    refuse_occupied(out)
    started = time.perf_counter()
    try:
        with directory(out) as unfinished:
            calibration = data()
            loaded = model_class(model).from_pretrained(model, dtype="auto")
            default = "cuda" if torch.cuda.is_available() else "cpu"
            reset_session()
            oneshot(
                model=loaded.to(device or default),
                recipe=str(recipe),
                output_dir=str(unfinished),
                **calibration,
            )
    except SafetensorError as error:
        # Weights that cannot be written, to a full disk say, are no OSError there.
        raise OSError(f"cannot write the checkpoint {out}: {error}") from error
    return (time.perf_counter() - started) / 60


def calibration_rows(
    model: str | Path, texts: Sequence[str], samples: int, sequence_length: int
) -> list[list[int]]:
    """
    Rows of ``sequence_length`` tokens, spread evenly over the texts.

    :param samples: rows at most
    :raises ValueError: if the texts are empty or fill not even two rows
    """
    if not any(text.strip() for text in texts):
        raise ValueError("the calibration text is empty")
    tokens = tokenize(model, "\n\n".join(texts))
    count = len(tokens) // sequence_length
    if count < 2:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens, fewer than two rows of "
            f"{sequence_length}: give more text or a smaller --sequence-length"
        )
    rows = tokens[: count * sequence_length].view(count, sequence_length)
    if count > samples:
        rows = rows[torch.linspace(0, count - 1, samples).long()]
    chosen: list[list[int]] = rows.tolist()
    return chosen
