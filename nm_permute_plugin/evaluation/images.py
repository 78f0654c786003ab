# SPDX-License-Identifier: Apache-2.0
"""Read folders of images as batches of the pixels that a model takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image, UnidentifiedImageError
from torch import Tensor

Pixels = Float[Tensor, "_images _channels _height _width"]  # the last batch is shorter

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
"""Files with one of these endings count as images; others are passed over."""


@dataclass(frozen=True)
class LabelledImages:
    """
    Images whose classes are known.

    :param files: the images, sorted by class
    :param labels: each file's index into ``classes``
    :param classes: the sorted names of the classes
    """

    files: list[Path]
    labels: Int[Tensor, " files"]
    classes: list[str]


def image_files(folder: Path) -> list[Path]:
    """
    List the images in a folder and in all folders below it, sorted.

    :raises FileNotFoundError: if it is no folder
    :raises ValueError: if it holds no images
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {folder} does not exist")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(
            f"image folder {folder} holds no images ({', '.join(sorted(SUFFIXES))})"
        )
    return files


def labelled_images(folder: Path) -> LabelledImages:
    """
    List the images of a folder of class folders, ``CLASS/*.jpg``.

    :raises FileNotFoundError: if it is no folder
    :raises ValueError: if it holds no images, or images outside of class folders
    """
    files = image_files(folder)
    for file in files:
        if file.parent == folder:
            raise ValueError(
                f"{file} stands in no class folder: the class of a image is the name "
                f"of its folder, as in {folder / 'CLASS' / file.name}"
            )
    names = [file.relative_to(folder).parts[0] for file in files]
    classes = sorted(set(names))
    labels = torch.tensor([classes.index(name) for name in names])
    return LabelledImages(files, labels, classes)


def pixels(processor: Any, files: Sequence[Path], batch_size: int) -> Iterator[Pixels]:
    """
    Yield batches of pixels, file after file; every image is made RGB first.

    :param processor: the checkpoint's image processor
    :raises ValueError: for a file that is no image, or is damaged
    """
    for first in range(0, len(files), batch_size):
        images = [_rgb(file) for file in files[first : first + batch_size]]
        values: Pixels = processor(images, return_tensors="pt")["pixel_values"]
        yield values


def _rgb(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{file} is no image that can be read: {error}") from error
