# SPDX-License-Identifier: Apache-2.0
"""
Text, images and both become batches: rows lose their padding, and nothing else changes.

What validates never trains; what is broken is refused.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from zoo_models import zoo_batches, zoo_model

from nm_permute_plugin.pruning.data import (
    Data,
    endless,
    split_images,
    split_text,
    token_mask,
)
from nm_permute_plugin.pruning.reading import FEWEST_TOKENS, read_samples, rows_of

VOCABULARY = 1000
VIT, TEXT, BOTH = "vit-labels", "llama-gqa", "qwen2.5-vl"


def numbered_rows(count: int, length: int = 8) -> list[Tensor]:
    """Rows that tell their number by every token."""
    return [torch.full((length,), i) for i in range(count)]


def rows_in(batches: list[dict[str, Tensor]]) -> list[list[int]]:
    return [
        row[mask].tolist()
        for batch in batches
        for row, mask in zip(batch["input_ids"], token_mask(batch), strict=True)
    ]


def test_rows_come_without_their_padding() -> None:
    ids = torch.arange(600).view(2, 300)
    mask = torch.ones_like(ids)
    mask[0, :50] = 0  # on the left, as tokenizers of language models pad
    mask[1, -20:] = 0
    rows = rows_of([{"input_ids": ids, "attention_mask": mask}], VOCABULARY)
    assert [row.tolist() for row in rows] == [
        list(range(50, 300)), list(range(300, 580))
    ]  # fmt: skip


def test_rows_of_several_batches_stay_in_order() -> None:
    batches = [{"input_ids": row[None]} for row in numbered_rows(40)]
    rows = rows_of(iter(batches), VOCABULARY)
    assert [int(row[0]) for row in rows] == list(range(40))


def test_rows_that_predict_nothing_are_left_out() -> None:
    ids = torch.zeros(3, 300, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    mask[0] = 1
    mask[1, 0] = 1
    assert len(rows_of([{"input_ids": ids, "attention_mask": mask}], VOCABULARY)) == 1


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "holds 0 tokens in 0 rows"),
        ([{"input_ids": torch.zeros(1, 255, dtype=torch.int64)}], "holds 255 tokens"),
        (
            [{"input_ids": torch.full((1, 256), VOCABULARY)}],
            "token 1000, but the model knows only 1000 tokens",
        ),
    ],
    ids=["empty", "too few", "unknown token"],
)
def test_text_that_is_no_use_is_refused(batches, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(batches, VOCABULARY)


def test_the_last_token_of_the_table_and_the_fewest_tokens_are_enough() -> None:
    ids = torch.full((1, FEWEST_TOKENS), VOCABULARY - 1)
    assert len(rows_of([{"input_ids": ids}], VOCABULARY)) == 1


@given(
    st.integers(2, 40),
    st.integers(1, 9),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.integers(0, 99),
)
@example(count=2, batch_size=1, share=0.9, seed=0)
def test_every_row_trains_or_judges_and_never_both(
    count: int, batch_size: int, share: float, seed: int
) -> None:
    text = split_text(numbered_rows(count), batch_size, share, seed)
    train = [row[0] for row in rows_in(text.train)]
    judges = [row[0] for row in rows_in(text.validation)]
    assert sorted(train + judges) == list(range(count))
    assert train
    assert judges
    sizes = [len(batch["input_ids"]) for batch in text.train]
    assert sizes == [batch_size] * (len(train) // batch_size) + (
        [len(train) % batch_size] if len(train) % batch_size else []
    )


def test_a_tenth_is_validation() -> None:
    text = split_text(numbered_rows(50), batch_size=8, validation_share=0.1, seed=0)
    assert len(rows_in(text.validation)) == 5
    assert text.tokens == 45 * 8


def test_the_seed_decides_who_judges() -> None:
    def judges(seed: int) -> list[list[int]]:
        return rows_in(split_text(numbered_rows(30), 4, 0.3, seed).validation)

    assert judges(1) == judges(1)
    assert judges(1) != judges(2)


def test_short_rows_are_padded_on_the_right_and_masked() -> None:
    rows = [torch.arange(1, 1 + length) for length in (3, 5, 2)]
    text = split_text(rows, batch_size=4, validation_share=0.1, seed=0)
    assert text.tokens == sum(map(len, rows_in(text.train)))
    assert sorted(rows_in(text.train) + rows_in(text.validation)) == sorted(
        row.tolist() for row in rows
    )
    (batch,) = text.train
    assert batch["attention_mask"].dtype == torch.int64
    assert bool((batch["attention_mask"].diff(dim=1) <= 0).all())


def test_rows_of_one_length_need_no_mask() -> None:
    text = split_text(numbered_rows(6), batch_size=2, validation_share=0.2, seed=0)
    assert [list(batch) for batch in text.train] == [["input_ids"]] * 3


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_rows_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"has {count} row.*at least 2"):
        split_text(numbered_rows(count), batch_size=2, validation_share=0.1, seed=0)


def test_every_number_comes_once_an_epoch() -> None:
    numbers = endless(5, seed=3)
    epochs = [[next(numbers) for _ in range(5)] for _ in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(5))] * 4
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = endless(5, seed=3)
    assert [[next(again) for _ in range(5)] for _ in range(4)] == epochs


def test_the_batches_train_in_the_order_of_those_numbers() -> None:
    data = split_text(numbered_rows(12), 2, validation_share=0.2, seed=0)
    batches = data.batches(seed=3)
    seen = [next(batches)["input_ids"] for _ in range(10)]
    numbers = endless(5, seed=3)
    for ids in seen:
        assert torch.equal(ids, data.train[next(numbers)]["input_ids"])


def test_all_tokens_count_without_an_attention_mask() -> None:
    mask = token_mask({"input_ids": torch.zeros(3, 12, dtype=torch.int64)})
    assert mask.shape == (3, 12)
    assert bool(mask.all())


def read(case: str, batches: object) -> Data:
    return read_samples(zoo_model(case), batches, 4, 0.25, seed=0)


def numbered_images(count: int) -> Tensor:
    """Images that tell their number by every pixel."""
    return torch.arange(count).float()[:, None, None, None].expand(count, 3, 16, 16)


def numbers_of(batches: list[dict[str, Tensor]]) -> list[int]:
    return [int(x) for batch in batches for x in batch["pixel_values"][:, 0, 0, 0]]


def test_every_image_trains_or_judges_in_batches_of_the_size_asked_for() -> None:
    loaded = [
        {"pixel_values": part, "labels": part} for part in numbered_images(21).split(5)
    ]
    samples = read(VIT, iter(loaded))
    train, held = numbers_of(samples.train), numbers_of(samples.validation)
    assert sorted(train + held) == list(range(21))
    assert len(held) == 5
    assert [len(batch["pixel_values"]) for batch in samples.train] == [4, 4, 4, 4]
    assert {tuple(batch) for batch in samples.train} == {("pixel_values",)}
    assert (str(samples), samples.tokens) == ("16 images", 0)


def test_the_seed_decides_which_images_judge() -> None:
    def judges(seed: int) -> list[int]:
        return numbers_of(split_images(numbered_images(30), 4, 0.3, seed).validation)

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
        (
            VIT,
            [{"pixel_values": numbered_images(1)}],
            "has 1 row; at least 2 are needed",
        ),
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
            [{"pixel_values": numbered_images(2)}, {"input_ids": IDS}],
            "some calibration batches hold images alone",
        ),
    ],
)
def test_data_that_is_no_use_is_refused(case: str, batches, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(case, batches)
