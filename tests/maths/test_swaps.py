# SPDX-License-Identifier: Apache-2.0
"""Swaps of two channels: what they promise, which are made, and what they leave."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nm_permute_plugin.maths.swaps import swap, swap_gains

M = 2


def random_blocks(seed: int, blocks: int, groups: int) -> tuple[Tensor, Tensor]:
    """Costs and groups of as many channels as fill the groups, in random places."""
    generator = torch.Generator().manual_seed(seed)
    size = groups * M
    own = torch.arange(groups).repeat_interleave(M)
    column = own[torch.rand(blocks, size, generator=generator).argsort()]
    return torch.randn(blocks, size, groups, generator=generator), column


def saved_by(costs: Tensor, column: Tensor, first: int, second: int) -> float:
    """How much the costs of one block fall when two channels change places."""
    after = column.clone()
    after[[first, second]] = column[[second, first]]
    before, then = (costs.gather(1, c[:, None]).double().sum() for c in (column, after))
    return float(before - then)


def best_of(costs: Tensor, column: Tensor) -> float:
    """The most that one swap in one block saves."""
    pairs = combinations(range(len(column)), 2)
    return max(saved_by(costs, column, *pair) for pair in pairs)


problems = given(
    seed=st.integers(0, 2**16), blocks=st.integers(1, 4), groups=st.integers(1, 4)
)


@problems
def test_the_gain_of_a_pair_is_what_its_swap_saves(
    seed: int, blocks: int, groups: int
) -> None:
    costs, column = random_blocks(seed, blocks, groups)
    gains = swap_gains(costs, column)
    for block in range(blocks):
        for first in range(groups * M):
            for second in range(groups * M):
                saved = saved_by(costs[block], column[block], first, second)
                found = float(gains[block, first, second])
                assert found == pytest.approx(saved, abs=1e-5)
                if column[block, first] == column[block, second]:
                    assert found == 0


@problems
def test_the_best_pair_of_each_block_is_swapped_if_it_saves_anything(
    seed: int, blocks: int, groups: int
) -> None:
    costs, column = random_blocks(seed, blocks, groups)
    after = column.clone()
    swap(costs.clone(), after, blocks)
    for of_block, before, then in zip(costs, column, after, strict=True):
        changed = (before != then).nonzero().flatten().tolist()
        best = best_of(of_block, before)
        if best <= 0:
            assert changed == []
        else:
            first, second = changed
            assert then[first] == before[second]
            assert then[second] == before[first]
            saved = saved_by(of_block, before, first, second)
            assert saved == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize(("most", "swaps"), [(0, 1), (1, 1), (3, 3), (5, 5), (9, 5)])
def test_at_most_so_many_blocks_swap_the_most_promising_first(
    most: int, swaps: int
) -> None:
    costs, column = random_blocks(0, 5, 3)
    saves = torch.tensor([best_of(c, g) for c, g in zip(costs, column, strict=True)])
    assert float(saves.min()) > 0
    after = column.clone()
    swap(costs, after, most)
    changed = (column != after).any(1).nonzero().flatten().tolist()
    assert sorted(saves.argsort(descending=True)[:swaps].tolist()) == changed


def test_no_swap_is_made_that_should_raise_the_loss() -> None:
    """Every channel is where it costs least."""
    costs, column = random_blocks(1, 4, 3)
    costs.scatter_(2, column[..., None], costs.amin(2, keepdim=True) - 1)
    before, groups = costs.clone(), column.clone()
    swap(costs, column, 4)
    assert torch.equal(column, groups)
    assert torch.equal(costs, before)


@problems
def test_groups_keep_their_sizes_however_often_channels_swap(
    seed: int, blocks: int, groups: int
) -> None:
    _, column = random_blocks(seed, blocks, groups)
    for step in range(5):
        costs, _ = random_blocks(seed + step + 1, blocks, groups)
        swap(costs, column, blocks)
    sizes = torch.nn.functional.one_hot(column, groups).sum(1)
    assert bool((sizes == M).all())


def test_costs_of_swapped_channels_are_forgotten_and_no_others() -> None:
    costs, column = random_blocks(2, 5, 3)
    before, groups = costs.clone(), column.clone()
    swap(costs, column, 3)
    swapped = column != groups
    assert int(swapped.sum()) == 2 * 3
    assert not bool(costs[swapped].any())
    assert torch.equal(costs[~swapped], before[~swapped])
