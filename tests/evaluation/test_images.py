# SPDX-License-Identifier: Apache-2.0
"""Images become pixels in order; what is no image is named."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from nm_permute_plugin.evaluation.images import (
    image_files,
    labelled_images,
    pixels,
)
from nm_permute_plugin.evaluation.pretrained import image_processor


def test_images_are_found_in_class_folders(image_folder: Path) -> None:
    found = labelled_images(image_folder)
    assert found.classes == ["blue", "green", "red"]
    assert found.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert [f.parent.name for f in found.files] == ["blue"] * 6 + ["green"] * 6 + [
        "red"
    ] * 6
    assert image_files(image_folder) == found.files


def test_pixels_are_those_of_the_checkpoints_processor(
    image_checkpoint, image_folder: Path
) -> None:
    processor = image_processor(image_checkpoint())
    files = image_files(image_folder)
    batches = list(pixels(processor, files, batch_size=7))
    assert [batch.shape for batch in batches] == [(n, 3, 16, 16) for n in (7, 7, 4)]
    values = torch.cat(batches)
    one_by_one = [
        processor(Image.open(file), return_tensors="pt")["pixel_values"]
        for file in files
    ]
    assert torch.equal(values, torch.cat(one_by_one))
    brightest = values.mean((2, 3)).argmax(1)
    assert brightest.tolist() == labelled_images(image_folder).labels.tolist()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_other_modes_become_colours(
    image_checkpoint, tmp_path: Path, mode: str
) -> None:
    file = tmp_path / "image.tiff"
    Image.new("RGB", (9, 9), (200, 200, 200)).convert(mode).save(file)
    (values,) = pixels(image_processor(image_checkpoint()), [file], 4)
    assert values.shape == (1, 3, 16, 16)
    assert bool(values.isfinite().all())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        image_files(tmp_path / "nowhere")


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="holds no images"):
        image_files(tmp_path)


def test_a_image_outside_of_class_folders_is_named(
    image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "lost.png").write_bytes(next(image_folder.rglob("*.png")).read_bytes())
    with pytest.raises(ValueError, match=r"lost\.png stands in no class folder"):
        labelled_images(tmp_path)


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_file_that_is_no_image_is_named(
    image_checkpoint, image_folder: Path, tmp_path: Path, damage: str
) -> None:
    whole = next(image_folder.rglob("*.png")).read_bytes()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image" if damage == "text" else whole[: len(whole) // 2])
    processor = image_processor(image_checkpoint())
    with pytest.raises(ValueError, match=r"bad\.png is no image that can be read"):
        list(pixels(processor, [bad], 4))
