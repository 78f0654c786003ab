# SPDX-License-Identifier: Apache-2.0
"""
The search never loses score, stays inside segments and finds planted groups.

Many spaces at once are found as each alone, and validation chooses among what was found.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import same_groups
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nm_permute_plugin.maths.masks import retained_score
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import check_permutation, invert
from nm_permute_plugin.pruning.problem import SpaceScores
from nm_permute_plugin.pruning.search import Perms, search
from nm_permute_plugin.specs.spec import Consumer, Space

PATTERNS = ["2:4", "1:2", "1:4", "3:4", "4:8"]
TWO_OF_FOUR = NMPattern(2, 4)


def found(
    score: Tensor,
    pattern: NMPattern,
    segment: int | None = None,
    rounds: int = 12,
    seed: int = 0,
) -> Tensor:
    """The permutation of one space after the last round, whatever the model says."""
    size = score.shape[1]
    space = Space("hidden.0", size, segment or size, (Consumer("down"),))
    spaces = {"hidden.0": SpaceScores.of(space, {"down": score})}
    perms, _ = search(spaces, pattern, rounds, seed, newest())
    return perms["hidden.0"]


def newest() -> Callable[[Perms], float]:
    """A validation that likes what it saw last."""
    count = itertools.count()
    return lambda perms: -float(next(count))


def random_score(seed: int, rows: int, channels: int) -> Tensor:
    """Heavy-tailed scores with loud channels, as those of language models are."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(rows, channels, generator=generator).exp()
    return score * torch.randn(channels, generator=generator).exp()


def planted_score(
    pattern: NMPattern, groups: int, rows: int, seed: int
) -> tuple[Tensor, Tensor]:
    """
    Scores and a permutation that retains them all.

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
    perm = found(score, pattern, seed=seed)
    check_permutation(perm)
    before = retained_score(score, pattern)
    # The assignment sees gains in float32.
    assert retained_score(score[:, perm], pattern) >= before * (1 - 1e-6)


@given(st.integers(0, 9999), st.sampled_from(PATTERNS))
def test_more_rounds_never_retain_less(seed: int, text: str) -> None:
    pattern = NMPattern.parse(text)
    score = random_score(seed, rows=9, channels=4 * pattern.m)
    kept = [
        retained_score(score[:, found(score, pattern, rounds=rounds)], pattern)
        for rounds in (3, 6, 12)
    ]
    assert kept[1] >= kept[0] * (1 - 1e-6)
    assert kept[2] >= kept[1] * (1 - 1e-6)


def test_groups_that_cannot_be_bettered_are_kept() -> None:
    score, planted = planted_score(TWO_OF_FOUR, groups=6, rows=40, seed=3)
    best = score[:, planted]
    perm = found(best, TWO_OF_FOUR)
    assert same_groups(perm, torch.arange(24), 4)


@pytest.mark.parametrize("text", ["2:4", "1:2", "1:4", "3:4"])
@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found(text: str, seed: int) -> None:
    pattern = NMPattern.parse(text)
    score, planted = planted_score(pattern, groups=4, rows=256, seed=seed)
    total = float(score.double().sum())
    assert retained_score(score[:, planted], pattern) == pytest.approx(total, rel=1e-6)
    assert retained_score(score, pattern) < 0.95 * total
    perm = found(score, pattern, rounds=200, seed=seed)
    assert same_groups(perm, planted, pattern.m)
    assert retained_score(score[:, perm], pattern) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("segment", [4, 8, 16])
def test_channels_stay_inside_their_segments(segment: int) -> None:
    score = random_score(0, rows=12, channels=32)
    perm = found(score, TWO_OF_FOUR, segment=segment)
    check_permutation(perm)
    assert torch.equal(perm // segment, torch.arange(32) // segment)


def test_a_segment_is_searched_as_if_it_stood_alone() -> None:
    score = random_score(0, rows=12, channels=16)
    beside = torch.cat([score, random_score(1, rows=12, channels=16)], dim=1)
    alone = found(score, TWO_OF_FOUR, seed=4)
    assert torch.equal(found(beside, TWO_OF_FOUR, segment=16, seed=4)[:16], alone)


def test_the_same_seed_gives_the_same_permutation() -> None:
    score = random_score(0, rows=12, channels=64)
    first, again = (found(score, TWO_OF_FOUR, seed=7) for _ in range(2))
    others = [found(score, TWO_OF_FOUR, seed=seed) for seed in (8, 9)]
    assert torch.equal(first, again)
    assert not all(torch.equal(first, other) for other in others)


def test_the_search_leaves_the_callers_random_numbers() -> None:
    state = torch.random.get_rng_state()
    found(random_score(0, rows=12, channels=16), TWO_OF_FOUR)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("segment", [24, 96])
def test_many_groups_are_assigned_in_parts(
    monkeypatch: pytest.MonkeyPatch, segment: int
) -> None:
    """As the wide spaces of large models are; every segment as if it stood alone."""
    score = random_score(3, 16, 96)
    whole = found(score, TWO_OF_FOUR, segment)
    monkeypatch.setattr("nm_permute_plugin.pruning.search.MOST_GROUPS", 4)
    perm = found(score, TWO_OF_FOUR, segment)
    check_permutation(perm)
    assert torch.equal(perm // segment, torch.arange(96) // segment)
    start, exact, parts = (
        float(retained_score(score[:, order], TWO_OF_FOUR))
        for order in (torch.arange(96), whole, perm)
    )
    assert start < parts <= exact * 1.001
    assert parts - start > 0.5 * (exact - start)
    assert torch.equal(
        perm[-segment:] - (96 - segment),
        found(score[:, -segment:], TWO_OF_FOUR, seed=96 // segment - 1),
    )


def test_equal_scores_are_no_obstacle() -> None:
    perm = found(torch.zeros(3, 16), TWO_OF_FOUR)
    assert torch.equal(perm.sort().values, torch.arange(16))


def test_a_segment_that_m_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="M=4 does not divide the 6 channels"):
        found(torch.ones(2, 12), TWO_OF_FOUR, segment=6)


def test_a_score_that_is_not_finite_is_refused() -> None:
    score = torch.ones(2, 8)
    score[1, 5] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        found(score, TWO_OF_FOUR)


def spaces_of(count: int) -> dict[str, SpaceScores]:
    """Spaces of different sizes; every second one has segments of 8 channels."""
    generator = torch.Generator().manual_seed(7)
    spaces = {}
    for i in range(count):
        size = 16 + 8 * i
        segment = 8 if i % 2 else size
        space = Space(f"hidden.{i}", size, segment, (Consumer(f"down.{i}"),))
        score = torch.randn(12, size, generator=generator).exp()
        spaces[space.name] = SpaceScores.of(space, {f"down.{i}": score})
    return spaces


def assert_same(first: Perms, second: Perms) -> None:
    assert list(first) == list(second)
    assert [n for n in first if not torch.equal(first[n], second[n])] == []


def by_score(spaces: dict[str, SpaceScores]) -> Callable[[Perms], float]:
    """A validation that likes what retains most."""

    def validate(perms: Perms) -> float:
        return -sum(
            retained_score(spaces[name].score[:, perm], TWO_OF_FOUR)
            for name, perm in perms.items()
        )

    return validate


def searched(spaces: dict[str, SpaceScores], rounds: int = 6, seed: int = 0) -> Perms:
    return search(spaces, TWO_OF_FOUR, rounds, seed, by_score(spaces))[0]


def test_spaces_searched_at_once_equal_spaces_searched_alone() -> None:
    alone = {
        name: found(of.score, TWO_OF_FOUR, of.space.segment, rounds=6, seed=2)
        for name, of in spaces_of(6).items()
    }
    assert_same(searched(spaces_of(6), seed=2), alone)


@pytest.mark.parametrize("most", [1, 500])
def test_it_does_not_matter_how_many_spaces_go_together(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    # Twelve spaces of two shapes: all of a shape at a time, two, or each alone.
    spaces = {
        f"hidden.{i}": replace(
            of, space=replace(of.space, name=f"hidden.{i}"), score=of.score + i
        )
        for i, of in enumerate(list(spaces_of(2).values()) * 6)
    }
    whole = searched(spaces, rounds=3)
    monkeypatch.setattr("nm_permute_plugin.pruning.search.MOST_SCORES", most)
    assert_same(whole, searched(spaces, rounds=3))


def test_every_space_stays_inside_its_segments_and_retains_more() -> None:
    spaces = spaces_of(4)
    for name, perm in searched(spaces).items():
        score, segment = spaces[name].score, spaces[name].space.segment
        assert torch.equal(perm // segment, torch.arange(len(perm)) // segment)
        before = retained_score(score, TWO_OF_FOUR)
        assert retained_score(score[:, perm], TWO_OF_FOUR) > before


def test_some_of_the_rows_find_a_permutation_for_all(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Channels that are alike stand together; every row would rather part them."""
    channels = torch.arange(32) // 4
    score = torch.rand(600, 8, generator=generator)[:, channels]
    score = score + 0.1 * torch.rand(600, 32, generator=generator)
    spaces = {"hidden.0": SpaceScores(Space("hidden.0", 32, 32), score, (600,))}
    retained = {}
    for most in (1 << 28, 600 * 32 // 5):
        name = "nm_permute_plugin.pruning.search.MOST_SCORES_OF_A_SPACE"
        monkeypatch.setattr(name, most)
        (perm,) = searched(spaces, rounds=12).values()
        retained[most] = retained_score(score[:, perm], TWO_OF_FOUR)
    before = retained_score(score, TWO_OF_FOUR)
    whole, part = (value - before for value in retained.values())
    assert whole > 0
    assert part > 0.9 * whole


@pytest.mark.parametrize("favourite", range(5))
def test_the_permutations_with_the_least_validation_loss_are_kept(
    favourite: int,
) -> None:
    seen: list[Perms] = []

    def validate(perms: Perms) -> float:
        seen.append(perms)
        return abs(favourite - len(seen) + 1)

    best, history = search(spaces_of(3), TWO_OF_FOUR, 12, 0, validate)
    assert len(seen) == 5
    assert_same(best, seen[favourite])
    losses = [entry["validation"] for entry in history]
    assert losses == [max(0, favourite - number) for number in range(5)]
    assert [entry["round"] for entry in history] == [0, 3, 6, 9, 12]


@pytest.mark.parametrize(("rounds", "last"), [(0, 0), (1, 3), (4, 6)])
def test_rounds_are_rounded_up_to_the_next_validation(rounds: int, last: int) -> None:
    _, history = search(spaces_of(1), TWO_OF_FOUR, rounds, 0, newest())
    assert history[-1]["round"] == last


def test_permutations_that_make_the_model_worse_are_not_taken() -> None:
    count = itertools.count()
    perms, _ = search(spaces_of(3), TWO_OF_FOUR, 4, 0, lambda _: float(next(count)))
    for perm in perms.values():
        assert torch.equal(perm, torch.arange(len(perm)))


def test_the_permutations_of_one_family_are_taken_where_the_others_do_harm() -> None:
    """A validation that dislikes whatever moves in a residual space."""
    spaces = spaces_of(2)
    space = Space("residual", 16, 16, (Consumer("down.0"),))
    spaces["residual"] = replace(spaces["hidden.0"], space=space)
    liked = by_score(spaces)

    def validate(perms: Perms) -> float:
        moved = not torch.equal(perms["residual"], torch.arange(16))
        return liked(perms) + 1000 * moved

    perms, history = search(spaces, TWO_OF_FOUR, 3, 0, validate)
    assert torch.equal(perms["residual"], torch.arange(16))
    alone = searched(spaces_of(2), rounds=3)
    assert_same({name: perms[name] for name in alone}, alone)
    assert history[1]["validation"] < history[0]["validation"]


def test_rows_without_sensitivity_have_no_say() -> None:
    of = spaces_of(1)["hidden.0"]
    heard = {"hidden.0": replace(of, sensitivity=(torch.arange(12) < 4).float())}
    perms, _ = search(heard, TWO_OF_FOUR, 6, 0, newest())
    expected = found(of.score[:4], TWO_OF_FOUR, rounds=6)
    assert torch.equal(perms["hidden.0"], expected)


def test_no_spaces_have_no_permutations() -> None:
    assert search({}, TWO_OF_FOUR, 3, 0, lambda perms: 0.0)[0] == {}
