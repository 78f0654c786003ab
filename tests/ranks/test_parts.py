# SPDX-License-Identifier: Apache-2.0
"""What each rank takes of the batches; ranks are numbers here, not processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import Batch
from nm_permute_plugin.pruning.running.backward import own_micro_batches


def of_ranks(monkeypatch: pytest.MonkeyPatch, count: int, number: int) -> None:
    monkeypatch.setattr(ranks, "count", lambda: count)
    monkeypatch.setattr(ranks, "number", lambda: number)


@given(
    count=st.integers(1, 5),
    rows=st.integers(1, 9),
    turn=st.integers(0, 6),
    size=st.none() | st.integers(1, 3),
)
def test_ranks_take_every_row_once(
    count: int, rows: int, turn: int, size: int | None
) -> None:
    lengths = torch.arange(rows) % 3 + 1
    mask = (torch.arange(4)[None] < lengths[:, None]).long()
    batch: Batch = {
        "input_ids": torch.arange(rows)[:, None].expand(rows, 4).clone(),
        "attention_mask": mask,
    }
    seen, share = [], 0.0
    with pytest.MonkeyPatch.context() as patch:
        for number in range(count):
            of_ranks(patch, count, number)
            parts = list(own_micro_batches(batch, turn, size))
            assert parts, "every rank runs the model"
            for part, of_part in parts:
                share += of_part
                if of_part:
                    seen += part["input_ids"][:, 0].tolist()
    assert sorted(seen) == list(range(rows))
    assert share == pytest.approx(1.0)


@given(count=st.integers(1, 5), items=st.integers(1, 9))
def test_items_are_dealt_once_and_evenly(count: int, items: int) -> None:
    dealt, lengths = [], set()
    with pytest.MonkeyPatch.context() as patch:
        for number in range(count):
            of_ranks(patch, count, number)
            own = ranks.dealt([f"item {i}" for i in range(items)])
            lengths.add(len(own))
            dealt += [i for i, item, counts in own if counts and item == f"item {i}"]
    assert sorted(dealt) == list(range(items))
    assert len(lengths) == 1


def test_a_sample_with_images_is_one_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = {"input_ids": torch.ones(1, 5), "pixel_values": torch.ones(12, 3)}
    shares = []
    for number in range(3):
        of_ranks(monkeypatch, 3, number)
        part, share = ranks.own_part(sample, turn=4)
        assert part is sample
        shares.append(share)
    assert shares == [0.0, 1.0, 0.0]
