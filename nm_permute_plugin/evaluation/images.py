# SPDX-License-Identifier: Apache-2.0
"""Folders of pictures, as batches of pixels that a model takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

Pixels = Float[Tensor, "_images _channels _height _width"]  # the last batch is shorter

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class LabelledImages:
    """
    Pictures whose classes are known.

    :param files: one after the other, class after class
    :param labels: of each file, its place in ``classes``
    :param classes: names, sorted
    """

    files: list[Path]
    labels: Int[Tensor, " files"]
    classes: list[str]


def image_files(folder: Path) -> list[Path]:
    """
    The pictures in a folder and in all folders below it, sorted.

    :raises FileNotFoundError: if it is no folder
    :raises ValueError: if it holds no pictures
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {folder} does not exist")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(
            f"image folder {folder} holds no pictures ({', '.join(sorted(SUFFIXES))})"
        )
    return files


def labelled_images(folder: Path) -> LabelledImages:
    """
    The pictures of a folder of class folders, ``CLASS/*.jpg``.

    :raises FileNotFoundError: if it is no folder
    :raises ValueError: if it holds no pictures, or pictures outside of class folders
    """
    files = image_files(folder)
    for file in files:
        if file.parent == folder:
            raise ValueError(
                f"{file} stands in no class folder: the class of a picture is the name "
                f"of its folder, as in {folder / 'CLASS' / file.name}"
            )
    names = [file.relative_to(folder).parts[0] for file in files]
    classes = sorted(set(names))
    labels = torch.tensor([classes.index(name) for name in names])
    return LabelledImages(files, labels, classes)


def image_processor(folder: str | Path) -> Any:
    """
    What turns pictures into a checkpoint's pixels; torchvision is not needed.

    :raises ValueError: if the checkpoint has none
    """
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no image processor (preprocessor_config.json), which says how "
            "pictures become pixels; copy it from the model's original folder"
        ) from error


def pixels(processor: Any, files: Sequence[Path], batch_size: int) -> Iterator[Pixels]:
    """
    Batches of pixels, file after file; grey and transparent pictures become colours.

    :param processor: of the checkpoint
    :raises ValueError: for a file that is no picture, or is damaged
    """
    for first in range(0, len(files), batch_size):
        pictures = [_picture(file) for file in files[first : first + batch_size]]
        values: Pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        yield values


def _picture(file: Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{file} is no picture that can be read: {error}") from error
