# SPDX-License-Identifier: Apache-2.0
"""Rows lose their padding and nothing else; the rows that judge never train."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.statistics import token_mask
from nm_permute_plugin.pruning.text import FEWEST_TOKENS, rows_of, split_text

VOCABULARY = 1000


def numbered(count: int, length: int = 8) -> list[Tensor]:
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
    batches = [{"input_ids": row[None]} for row in numbered(40)]
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
@example(count=2, batch_size=1, validation=0.9, seed=0)
def test_every_row_trains_or_judges_and_never_both(
    count: int, batch_size: int, validation: float, seed: int
) -> None:
    text = split_text(numbered(count), batch_size, validation, seed)
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
    text = split_text(numbered(50), batch_size=8, validation=0.1, seed=0)
    assert len(rows_in(text.validation)) == 5
    assert text.tokens == 45 * 8


def test_the_seed_decides_who_judges() -> None:
    def judges(seed: int) -> list[list[int]]:
        return rows_in(split_text(numbered(30), 4, 0.3, seed).validation)

    assert judges(1) == judges(1)
    assert judges(1) != judges(2)


def test_short_rows_are_padded_on_the_right_and_masked() -> None:
    rows = [torch.arange(1, 1 + length) for length in (3, 5, 2)]
    text = split_text(rows, batch_size=4, validation=0.1, seed=0)
    assert text.tokens == sum(map(len, rows_in(text.train)))
    assert sorted(rows_in(text.train) + rows_in(text.validation)) == sorted(
        row.tolist() for row in rows
    )
    (batch,) = text.train
    assert batch["attention_mask"].dtype == torch.int64
    assert bool((batch["attention_mask"].diff(dim=1) <= 0).all())


def test_rows_of_one_length_need_no_mask() -> None:
    text = split_text(numbered(6), batch_size=2, validation=0.2, seed=0)
    assert [list(batch) for batch in text.train] == [["input_ids"]] * 3
    assert isinstance(text, Samples)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_rows_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"has {count} row.*at least 2"):
        split_text(numbered(count), batch_size=2, validation=0.1, seed=0)
