# SPDX-License-Identifier: Apache-2.0
"""Index vectors: the laws of inverse and composition, heads, blocks and groups."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nm_permute_plugin.maths.permutation import (
    check_permutation,
    compose,
    expand_heads,
    from_blocks,
    invert,
)


def permutations_of(size: int) -> st.SearchStrategy[torch.Tensor]:
    return st.permutations(range(size)).map(torch.tensor)


sizes = st.integers(1, 24)


@given(sizes.flatmap(permutations_of))
def test_the_inverse_undoes_a_permutation(perm: torch.Tensor) -> None:
    values = torch.arange(len(perm)) * 10
    assert torch.equal(values[perm][invert(perm)], values)
    assert torch.equal(invert(invert(perm)), perm)


@given(sizes.flatmap(lambda n: st.tuples(permutations_of(n), permutations_of(n))))
def test_composition_is_first_one_then_the_other(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    first, second = pair
    values = torch.arange(len(first)) * 10
    assert torch.equal(values[compose(first, second)], values[first][second])
    assert torch.equal(compose(first, invert(first)), torch.arange(len(first)))
    both = compose(first, second)
    assert torch.equal(invert(both), compose(invert(second), invert(first)))


@given(
    st.integers(1, 8).flatmap(
        lambda size: st.lists(permutations_of(size), min_size=1, max_size=4)
    )
)
def test_blocks_stay_in_their_runs(blocks: list[torch.Tensor]) -> None:
    size = len(blocks[0])
    perm = from_blocks(torch.stack(blocks))
    check_permutation(perm)
    for index, block in enumerate(blocks):
        run = perm[index * size : (index + 1) * size]
        assert torch.equal(run - index * size, block)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 999))
def test_every_query_head_follows_its_key_value_head(
    heads: int, queries: int, head_dim: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    perm = from_blocks(torch.rand(heads, head_dim, generator=generator).argsort())
    value = torch.arange(heads * head_dim).reshape(heads, 1, head_dim)
    shared = value.expand(-1, queries, -1).flatten()
    expanded = expand_heads(perm, head_dim, queries)
    check_permutation(expanded)
    # What a query head reads in the new order is what its shared head writes there.
    written = torch.arange(heads * head_dim)[perm].reshape(heads, 1, head_dim)
    assert torch.equal(shared[expanded], written.expand(-1, queries, -1).flatten())


@pytest.mark.parametrize("queries", [1, 2])
def test_a_permutation_that_leaves_its_head_is_refused(queries: int) -> None:
    with pytest.raises(ValueError, match="out of its head of 2 channels"):
        expand_heads(torch.tensor([2, 1, 0, 3]), head_dim=2, queries=queries)


@pytest.mark.parametrize(
    ("perm", "missing"),
    [([0, 0, 2], 1), ([1, 2, 3], 0), ([0, 1, -1], 2), ([0, 1, 1_000_000], 2)],
    ids=["twice", "too large", "negative", "far out"],
)
def test_no_permutation_is_refused_with_the_missing_channel(
    perm: list[int], missing: int
) -> None:
    with pytest.raises(ValueError, match=f"hidden.7 .* 3 channels: channel {missing} "):
        check_permutation(torch.tensor(perm), "hidden.7")
