# SPDX-License-Identifier: Apache-2.0
"""Searching several spaces at once is searching each of them alone."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nm_permute_plugin.maths.masks import retained_score
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.search import search_order, search_orders
from nm_permute_plugin.pruning.stacking import StackedScore
from nm_permute_plugin.specs.spec import Consumer, Space

TWO_OF_FOUR = NMPattern(2, 4)


def stacks_of(count: int) -> dict[str, StackedScore]:
    """Spaces of different sizes; every second one has segments of 8 channels."""
    generator = torch.Generator().manual_seed(7)
    stacks = {}
    for i in range(count):
        size = 16 + 8 * i
        space = Space(
            f"hidden.{i}", size, 8 if i % 2 else size, (Consumer(f"down.{i}"),)
        )
        score = torch.randn(12, size, generator=generator).exp()
        stacks[space.name] = StackedScore.of(space, {f"down.{i}": score})
    return stacks


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    assert [n for n in first if not torch.equal(first[n], second[n])] == []


def by_score(stacks: dict[str, StackedScore]) -> Callable[[dict[str, Tensor]], float]:
    """A judge that likes what retains most."""

    def judge(perms: dict[str, Tensor]) -> float:
        return -sum(
            retained_score(stacks[name].score[:, perm], TWO_OF_FOUR)
            for name, perm in perms.items()
        )

    return judge


def search(count: int, rounds: int, seed: int) -> dict[str, Tensor]:
    stacks = stacks_of(count)
    return search_orders(stacks, TWO_OF_FOUR, rounds, seed, by_score(stacks)).perms


def test_spaces_searched_at_once_equal_spaces_searched_alone() -> None:
    alone = {
        name: search_order(stack.score, TWO_OF_FOUR, stack.space.segment, 6, seed=2)
        for name, stack in stacks_of(6).items()
    }
    assert_same(search(6, rounds=6, seed=2), alone)


def test_the_same_seed_finds_the_same_orders() -> None:
    runs = [search(8, rounds=6, seed=0) for _ in range(3)]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@pytest.mark.parametrize("most", [1, 500])
def test_it_does_not_matter_how_many_spaces_go_together(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    # Twelve spaces of two shapes: all of a shape at a time, two, or each alone.
    together = {**stacks_of(1), **stacks_of(2)}
    stacks = {
        f"hidden.{i}": StackedScore(
            Space(f"hidden.{i}", *like), stack.score + i, stack.rows
        )
        for i, stack in enumerate(list(together.values()) * 6)
        if (like := (stack.space.size, stack.space.segment, stack.space.consumers))
    }
    whole = search_orders(stacks, TWO_OF_FOUR, 3, 0, by_score(stacks)).perms
    monkeypatch.setattr("nm_permute_plugin.pruning.search.MOST_SCORES", most)
    apart = search_orders(stacks, TWO_OF_FOUR, 3, 0, by_score(stacks)).perms
    assert_same(whole, apart)


def test_channels_stay_inside_their_walls() -> None:
    stacks = stacks_of(4)
    for name, order in search(4, rounds=6, seed=0).items():
        segment = stacks[name].space.segment
        assert torch.equal(order // segment, torch.arange(len(order)) // segment)


def test_every_space_retains_more_than_before() -> None:
    stacks = stacks_of(4)
    for name, order in search(4, rounds=6, seed=0).items():
        score = stacks[name].score
        before = retained_score(score, TWO_OF_FOUR)
        assert retained_score(score[:, order], TWO_OF_FOUR) > before


def test_a_part_of_the_rows_finds_an_order_for_all(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Channels that are alike stand together; every row would rather part them."""
    channels = torch.arange(32) // 4
    score = torch.rand(600, 8, generator=generator)[:, channels]
    score = score + 0.1 * torch.rand(600, 32, generator=generator)
    stacks = {"hidden.0": StackedScore(Space("hidden.0", 32, 32), score, (600,))}
    retained = {}
    for most in (1 << 28, 600 * 32 // 5):
        name = "nm_permute_plugin.pruning.search.MOST_SCORES_OF_A_SPACE"
        monkeypatch.setattr(name, most)
        judge = by_score(stacks)
        (order,) = search_orders(stacks, TWO_OF_FOUR, 12, 0, judge).perms.values()
        retained[most] = retained_score(score[:, order], TWO_OF_FOUR)
    before = retained_score(score, TWO_OF_FOUR)
    whole, part = (value - before for value in retained.values())
    assert whole > 0
    assert part > 0.9 * whole


@pytest.mark.parametrize("favourite", range(5))
def test_the_orders_that_the_judge_likes_best_are_kept(favourite: int) -> None:
    seen: list[dict[str, Tensor]] = []

    def judge(perms: dict[str, Tensor]) -> float:
        seen.append(perms)
        return abs(favourite - len(seen) + 1)

    found = search_orders(stacks_of(3), TWO_OF_FOUR, rounds=12, seed=0, judge=judge)
    assert len(seen) == 5
    assert_same(found.perms, seen[favourite])
    losses = [look["validation"] for look in found.history]
    assert losses == [max(0, favourite - look) for look in range(5)]
    assert [look["round"] for look in found.history] == [0, 3, 6, 9, 12]


def test_orders_that_the_judge_likes_less_are_not_taken() -> None:
    worse = search_orders(stacks_of(3), TWO_OF_FOUR, 4, 0, rising())
    for perm in worse.perms.values():
        assert torch.equal(perm, torch.arange(len(perm)))


def rising() -> Callable[[dict[str, Tensor]], float]:
    """A judge that likes what it saw first."""
    count = itertools.count()
    return lambda perms: float(next(count))


def test_the_orders_of_one_family_are_taken_where_the_others_do_harm() -> None:
    """A judge that dislikes whatever moves in a residual space."""
    stacks = stacks_of(2)
    space = Space("residual", 16, 16, (Consumer("down.0"),))
    stacks["residual"] = replace(stacks["hidden.0"], space=space)
    liked = by_score(stacks)

    def judge(perms: dict[str, Tensor]) -> float:
        moved = not torch.equal(perms["residual"], torch.arange(16))
        return liked(perms) + 1000 * moved

    found = search_orders(stacks, TWO_OF_FOUR, 3, 0, judge)
    assert torch.equal(found.perms["residual"], torch.arange(16))
    alone = search(2, rounds=3, seed=0)
    assert_same({name: found.perms[name] for name in alone}, alone)
    assert found.history[1]["validation"] < found.history[0]["validation"]


def test_rows_that_weigh_nothing_have_no_say() -> None:
    stack = stacks_of(1)["hidden.0"]
    weights = (torch.arange(12) < 4).float()
    heard = {"hidden.0": replace(stack, weights=weights)}
    (order,) = search_orders(heard, TWO_OF_FOUR, 6, 0, by_round()).perms.values()
    expected = search_order(stack.score[:4], TWO_OF_FOUR, rounds=6, seed=0)
    assert torch.equal(order, expected)


def by_round() -> Callable[[dict[str, Tensor]], float]:
    """A judge that likes what it saw last."""
    count = itertools.count()
    return lambda perms: -float(next(count))


def test_no_spaces_have_no_orders() -> None:
    assert search_orders({}, TWO_OF_FOUR, 3, 0, lambda perms: 0.0).perms == {}
