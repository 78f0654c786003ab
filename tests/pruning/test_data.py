# SPDX-License-Identifier: Apache-2.0
"""Text, images and both become samples, unchanged; what is broken is refused."""

import pytest
import torch
from torch import Tensor
from zoo_models import zoo_batches, zoo_model

from nm_permute_plugin.pruning.data import read_samples, split_images
from nm_permute_plugin.pruning.samples import Samples

VIT, TEXT, BOTH = "vit-labels", "llama-gqa", "qwen2.5-vl"


def read(case: str, batches: object) -> Samples:
    return read_samples(zoo_model(case), batches, 4, 0.25, seed=0)


def numbered(count: int) -> Tensor:
    """Images that tell their number by every pixel."""
    return torch.arange(count).float()[:, None, None, None].expand(count, 3, 16, 16)


def numbers(batches: list[dict[str, Tensor]]) -> list[int]:
    return [int(x) for batch in batches for x in batch["pixel_values"][:, 0, 0, 0]]


def test_every_image_trains_or_judges_in_batches_of_the_size_asked_for() -> None:
    loaded = [{"pixel_values": part, "labels": part} for part in numbered(21).split(5)]
    samples = read(VIT, iter(loaded))
    train, held = numbers(samples.train), numbers(samples.validation)
    assert sorted(train + held) == list(range(21))
    assert len(held) == 5
    assert [len(batch["pixel_values"]) for batch in samples.train] == [4, 4, 4, 4]
    assert {tuple(batch) for batch in samples.train} == {("pixel_values",)}
    assert (str(samples), samples.tokens) == ("16 images", 0)


def test_the_seed_decides_which_images_judge() -> None:
    def judges(seed: int) -> list[int]:
        return numbers(split_images(numbered(30), 4, 0.3, seed).validation)

    assert judges(1) == judges(1)
    assert judges(1) != judges(2)


def test_a_sample_of_text_with_images_stays_as_the_collator_gives_it() -> None:
    batches = zoo_batches(zoo_model(BOTH))
    loaded = [batch | {"labels": batch["input_ids"], "text": "a"} for batch in batches]
    samples = read(BOTH, loaded)
    dealt = [*samples.train, *samples.validation]
    assert (len(samples.train), len(samples.validation)) == (6, 2)
    for batch in batches:
        (same,) = [x for x in dealt if torch.equal(x["input_ids"], batch["input_ids"])]
        assert set(same) == set(batch)
        assert all(torch.equal(same[name], batch[name]) for name in batch)
    tokens = sum(batch["input_ids"].numel() for batch in samples.train)
    assert str(samples) == f"{tokens} tokens and 6 images"


def test_text_alone_may_stand_among_samples_with_images() -> None:
    batches = zoo_batches(zoo_model(BOTH))
    batches[3] = {"input_ids": batches[3]["input_ids"][:, :9]}
    samples = read(BOTH, batches)
    assert len(samples.train) + len(samples.validation) == len(batches)


def test_text_alone_is_cut_into_rows_for_a_model_of_text_and_images() -> None:
    ids = torch.randint(3, 40, (12, 32), generator=torch.Generator().manual_seed(0))
    samples = read(BOTH, [{"input_ids": ids}])
    assert str(samples) == f"{9 * 32} tokens"
    assert [batch["input_ids"].shape for batch in samples.train][0] == (4, 32)


NAN = torch.full((2, 3, 16, 16), float("nan"))
IDS = torch.zeros(1, 300, dtype=torch.int64)
PATCHES = {"pixel_values": torch.zeros(4, 96), "image_grid_thw": torch.ones(1, 3)}


@pytest.mark.parametrize(
    ("case", "batches", "message"),
    [
        (VIT, None, "there is no calibration data.*--images FOLDER"),
        (VIT, [{}], "holds nothing, but no input_ids and no pixel_values"),
        (VIT, [{"label": 1}], "holds label, but no input_ids and no pixel_values"),
        (VIT, [{"input_ids": IDS}], "takes images alone, but .* holds input_ids"),
        (TEXT, [{"pixel_values": NAN}], "takes text alone, but .* holds pixel_values"),
        ("clip", [{"input_ids": IDS}], "towers one by one"),
        (VIT, [{"pixel_values": numbered(1)}], "has 1 row; at least 2 are needed"),
        (VIT, [{"pixel_values": NAN}], "batch 0 holds pixels that are not finite"),
        (
            VIT,
            [{"pixel_values": torch.zeros(3, 16, 16)}],
            r"pixel_values of shape \[3, 16, 16\] and torch.float32",
        ),
        (
            VIT,
            [{"pixel_values": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}],
            "and torch.uint8; images are floats",
        ),
        (
            VIT,
            [{"pixel_values": torch.zeros(1, 3, 16, width)} for width in (16, 20)],
            "differ in size: 3 x 16 x 16, 3 x 16 x 20",
        ),
        (BOTH, [{"input_ids": IDS, **PATCHES}, PATCHES], "batch 1 must be one sample"),
        (
            BOTH,
            [{"input_ids": IDS.expand(2, 300), **PATCHES}],
            r"got shape \[2, 300\]. Use batch_size=1",
        ),
        (
            BOTH,
            [{"input_ids": IDS + 48, **PATCHES}],
            "token 48, but the model knows only 48",
        ),
        (
            BOTH,
            [{"input_ids": IDS, "pixel_values": torch.full((4, 96), float("inf"))}],
            "batch 0 holds pixels that are not finite",
        ),
        (
            BOTH,
            [{"pixel_values": numbered(2)}, {"input_ids": IDS}],
            "some calibration batches hold images alone",
        ),
    ],
)
def test_data_that_is_no_use_is_refused(case: str, batches, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(case, batches)
