# SPDX-License-Identifier: Apache-2.0
"""The ranks of small groups, their values at a rank, and their order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from nm_permute_plugin.maths.ranks import at_rank, descending, group_ranks


@st.composite
def groups(draw: st.DrawFn) -> torch.Tensor:
    """Groups of 1 to 8 of few distinct values, so that most hold ties: [groups, m]."""
    m, count = draw(st.integers(1, 8)), draw(st.integers(1, 16))
    size = count * m
    values = draw(st.lists(st.integers(-2, 3), min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float32).reshape(count, m)


@given(groups())
def test_ranks_are_those_of_a_stable_sort(score: torch.Tensor) -> None:
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    assert torch.equal(group_ranks(score).long(), torch.argsort(order, dim=-1))


@given(groups())
def test_the_value_at_a_rank_is_that_of_the_sorted_group(score: torch.Tensor) -> None:
    ranked = torch.sort(score, dim=-1, descending=True).values
    for rank in range(score.shape[-1]):
        assert torch.equal(at_rank(score, group_ranks(score), rank), ranked[:, rank])


@given(groups())
def test_groups_come_in_descending_order(score: torch.Tensor) -> None:
    ranked = torch.sort(score, dim=-1, descending=True).values
    assert torch.equal(torch.stack(descending(score), dim=-1), ranked)
