# SPDX-License-Identifier: Apache-2.0
"""The search never loses score, stays inside segments and finds planted groups."""

import pytest
import torch
from helpers import same_groups
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nm_permute_plugin.maths.masks import retained_score
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import check_permutation, invert
from nm_permute_plugin.pruning.search import deal, insertion_gain, search_order

PATTERNS = ["2:4", "1:2", "1:4", "3:4", "4:8"]


def random_score(seed: int, rows: int, channels: int) -> Tensor:
    """Heavy-tailed scores with loud channels, as those of language models are."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(rows, channels, generator=generator).exp()
    return score * torch.randn(channels, generator=generator).exp()


def planted_score(
    pattern: NMPattern, groups: int, rows: int, seed: int
) -> tuple[Tensor, Tensor]:
    """
    Scores and an order that retains them all.

    Every row has N scores in every planted group and zeros elsewhere, so that the
    planted grouping loses nothing; then the channels are shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(rows, groups, pattern.m, generator=generator).argsort().argsort()
    sizes = 0.5 + torch.rand(rows, groups, pattern.m, generator=generator)
    score = (sizes * (ranks < pattern.n)).flatten(1)
    shuffle = torch.randperm(groups * pattern.m, generator=generator)
    return score[:, shuffle], invert(shuffle)


@given(st.integers(0, 9999), st.sampled_from(PATTERNS), st.integers(1, 4))
def test_the_search_never_retains_less_than_the_start(
    seed: int, text: str, groups: int
) -> None:
    pattern = NMPattern.parse(text)
    score = random_score(seed, rows=9, channels=groups * pattern.m)
    order = search_order(score, pattern, seed=seed)
    check_permutation(order)
    before = retained_score(score, pattern)
    # The assignment sees gains in float32.
    assert retained_score(score[:, order], pattern) >= before * (1 - 1e-6)


@given(st.integers(0, 9999), st.sampled_from(PATTERNS))
def test_more_rounds_never_retain_less(seed: int, text: str) -> None:
    pattern = NMPattern.parse(text)
    score = random_score(seed, rows=9, channels=4 * pattern.m)
    kept = [
        retained_score(score[:, search_order(score, pattern, rounds=rounds)], pattern)
        for rounds in (1, 3, 9)
    ]
    assert kept[1] >= kept[0] * (1 - 1e-6)
    assert kept[2] >= kept[1] * (1 - 1e-6)


def test_an_order_that_cannot_be_bettered_is_kept() -> None:
    score, planted = planted_score(NMPattern(2, 4), groups=6, rows=40, seed=3)
    best = score[:, planted]
    order = search_order(best, NMPattern(2, 4))
    assert same_groups(order, torch.arange(24), 4)


@pytest.mark.parametrize("text", ["2:4", "1:2", "1:4", "3:4"])
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_order_is_found(text: str, seed: int) -> None:
    pattern = NMPattern.parse(text)
    score, planted = planted_score(pattern, groups=4, rows=256, seed=seed)
    total = float(score.double().sum())
    assert retained_score(score[:, planted], pattern) == pytest.approx(total, rel=1e-6)
    assert retained_score(score, pattern) < 0.95 * total
    order = search_order(score, pattern, rounds=200, seed=seed)
    assert same_groups(order, planted, pattern.m)
    assert retained_score(score[:, order], pattern) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("segment", [4, 8, 16])
def test_channels_stay_inside_their_walls(segment: int) -> None:
    score = random_score(0, rows=12, channels=32)
    order = search_order(score, NMPattern(2, 4), segment=segment)
    check_permutation(order)
    assert torch.equal(order // segment, torch.arange(32) // segment)


def test_a_wall_is_searched_as_if_it_stood_alone() -> None:
    score = random_score(0, rows=12, channels=16)
    beside = torch.cat([score, random_score(1, rows=12, channels=16)], dim=1)
    alone = search_order(score, NMPattern(2, 4), seed=4)
    assert torch.equal(
        search_order(beside, NMPattern(2, 4), segment=16, seed=4)[:16], alone
    )


def test_the_same_seed_gives_the_same_order() -> None:
    score = random_score(0, rows=12, channels=64)
    first, again = (search_order(score, NMPattern(2, 4), seed=7) for _ in range(2))
    others = [search_order(score, NMPattern(2, 4), seed=seed) for seed in (8, 9)]
    assert torch.equal(first, again)
    assert not all(torch.equal(first, other) for other in others)


def test_the_search_leaves_the_callers_random_numbers() -> None:
    state = torch.random.get_rng_state()
    search_order(random_score(0, rows=12, channels=16), NMPattern(2, 4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_equal_scores_are_no_obstacle() -> None:
    order = search_order(torch.zeros(3, 16), NMPattern(2, 4))
    assert torch.equal(order.sort().values, torch.arange(16))


def test_a_wall_that_m_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="M=4 does not divide the 6 channels"):
        search_order(torch.ones(2, 12), NMPattern(2, 4), segment=6)


def test_a_score_that_is_not_finite_is_refused() -> None:
    score = torch.ones(2, 8)
    score[1, 5] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        search_order(score, NMPattern(2, 4))


@given(st.integers(0, 9999), st.integers(1, 6), st.integers(1, 6), st.integers(1, 40))
def test_the_insertion_gain_is_the_sum_of_what_exceeds_the_threshold(
    seed: int, channels: int, groups: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inserted = torch.rand(rows, channels, generator=generator)
    threshold = torch.rand(rows, groups, generator=generator)
    direct = (inserted.double()[:, :, None] - threshold.double()[:, None]).relu().sum(0)
    gain = insertion_gain(inserted.T, threshold.T)
    torch.testing.assert_close(gain.double(), direct, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", PATTERNS)
def test_the_insertion_gain_is_the_change_of_the_retained_score(text: str) -> None:
    pattern = NMPattern.parse(text)
    companions = random_score(1, rows=20, channels=pattern.m - 1)
    channel = random_score(2, rows=20, channels=1)
    ranked = companions.sort(dim=1, descending=True).values
    threshold = ranked[:, pattern.n - 1, None]
    with_it = retained_score(torch.cat([companions, channel], dim=1), pattern)
    without = float(ranked[:, : pattern.n].double().sum())
    gain = float(insertion_gain(channel.T, threshold.T))
    assert gain == pytest.approx(with_it - without, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("m", [2, 4, 8])
def test_dealing_spreads_the_strongest_channels(m: int) -> None:
    groups = 6
    score = random_score(0, rows=5, channels=groups * m)
    order = deal(score, m)
    check_permutation(order)
    strength = score.sum(0).argsort(descending=True).argsort()
    # Each group holds one channel of every rank band.
    bands = (strength[order] // groups).reshape(groups, m).sort(dim=-1).values
    assert torch.equal(bands, torch.arange(m).expand(groups, m))
