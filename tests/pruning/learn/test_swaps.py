# SPDX-License-Identifier: Apache-2.0
"""Swaps of channels: what grouped masks are, what moves cost, and which swaps are made."""

import pytest
import torch
from helpers import same_groups
from learning import as_it_is, learn_anything, leaves
from torch import Tensor, nn

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import invert
from nm_permute_plugin.maths.swaps import grouped_mask, move_costs
from nm_permute_plugin.pruning.learn.swaps import ChannelSwaps, GroupedMask
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.running.masked import masked
from nm_permute_plugin.pruning.settings import LearnSettings
from nm_permute_plugin.specs.spec import Consumer

ROWS, BLOCKS, GROUPS = 6, 2, 3


def random_mask(
    pattern: NMPattern, queries: int = 1, rows: slice = slice(None)
) -> GroupedMask:
    """Of a linear with 6 rows, in random groups, three in each of two blocks."""
    generator = torch.Generator().manual_seed(queries)
    size = GROUPS * pattern.m
    keys = torch.rand(BLOCKS, size, generator=generator).argsort()
    return GroupedMask(
        Consumer("o", queries, BLOCKS * size) if queries > 1 else Consumer("o"),
        torch.rand(queries * ROWS, BLOCKS * size, generator=generator),
        torch.randperm(BLOCKS * size, generator=generator),
        torch.arange(GROUPS).repeat_interleave(pattern.m)[keys],
        torch.zeros(BLOCKS, size, GROUPS, requires_grad=True),
        rows,
        pattern,
    )


def blocks(mask: GroupedMask, matrix: Tensor) -> Tensor:
    return matrix[:, mask.start].unflatten(1, (BLOCKS, -1))


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("queries", [1, 3])
def test_it_is_the_mask_of_the_groups(text: str, queries: int) -> None:
    mask = random_mask(NMPattern.parse(text), queries)
    expected = grouped_mask(blocks(mask, mask.score), mask.group_of, mask.pattern)
    back = invert(mask.start)
    view = mask.consumer.view(mask.kept())
    assert torch.equal(view, expected.flatten(1)[:, back])


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("rows", [slice(None), slice(2, None, 4)], ids=["all", "some"])
def test_its_gradients_are_the_costs_of_moves(queries: int, rows: slice) -> None:
    mask = random_mask(NMPattern(2, 4), queries, rows)
    width = queries * mask.score.shape[1]
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(9))
    model = nn.Sequential(nn.Linear(width, ROWS))
    plain = mask.kept().float().requires_grad_()
    for each in (plain, mask):
        with masked(model, {"0": each}):
            model(x).square().sum().backward()
    score = blocks(mask, mask.score)[rows]
    grad = blocks(mask, mask.consumer.view(plain.grad))[rows]
    expected = move_costs(score, grad, mask.group_of, mask.pattern)
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(mask.cost.grad, expected, rtol=1e-4, atol=1e-4)


def learner_of(
    problem: Problem, start: Solution, fixed: tuple[str, ...] = (), **settings
) -> ChannelSwaps:
    swaps = {"block_size": 16, **settings}
    learn = LearnSettings(stages=("swaps",), swaps=swaps)
    return ChannelSwaps(problem, start, learn, steps=8, fixed=fixed)


def groups_of(learner: ChannelSwaps, linears: list[str]) -> Tensor:
    """The group of every channel, block by block, as it is now."""
    masks = learner.masks()
    return torch.cat([masks[name].group_of.clone() for name in linears])


def test_gradients_are_used_up_where_they_are(
    problem: Problem, start: Solution, generator: torch.Generator
) -> None:
    """The next backward pass adds to zeros, where a captured graph finds them."""
    learner = learner_of(problem, start)
    learn_anything(learner, generator, steps=1)
    grads = [cost.grad for cost in leaves(learner)]
    learn_anything(learner, generator, steps=1)
    for cost, grad in zip(leaves(learner), grads, strict=True):
        assert cost.grad is grad
        assert not bool(grad.any())
        assert not bool(cost.any())


def test_without_gradients_nothing_moves(problem: Problem, start: Solution) -> None:
    learner = learner_of(problem, start)
    learner.update()
    for name, perm in learner.solution().perms.items():
        assert same_groups(perm, start.perms[name], 4)


@pytest.mark.parametrize(("share", "swaps"), [(0.01, 1), (0.5, 3), (1.0, 6)])
def test_so_many_blocks_of_a_shape_swap(
    problem: Problem, start: Solution, generator, share: float, swaps: int
) -> None:
    others = tuple(n for n in problem.spaces if not n.startswith("hidden"))
    learner = learner_of(problem, start, others, share=share)
    down = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    before = groups_of(learner, down)
    learn_anything(learner, generator, steps=1)
    changed = (groups_of(learner, down) != before).sum(1)
    assert changed.sort(descending=True).values.tolist() == [2] * swaps + [0] * (
        6 - swaps
    )


def test_fewer_and_fewer_blocks_swap(
    problem: Problem, start: Solution, generator: torch.Generator
) -> None:
    others = tuple(n for n in problem.spaces if not n.startswith("hidden"))
    learner = learner_of(problem, start, others)
    down = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    swaps = []
    for _ in range(8):
        before = groups_of(learner, down)
        learn_anything(learner, generator, steps=1)
        swaps.append(int((groups_of(learner, down) != before).any(1).sum()))
    # Of 6 blocks, in eighths: rounded half to even, and one at least is tried.
    most = [6, 5, 4, 4, 3, 2, 2, 1]
    assert all(made <= limit for made, limit in zip(swaps, most, strict=True))
    assert swaps[0] == 6


def test_costs_of_former_steps_count(problem: Problem, start: Solution) -> None:
    """What two steps say outweighs what a third says against them."""
    others = tuple(n for n in problem.spaces if n != "value.0")
    learner = learner_of(problem, start, others)
    linear = "model.layers.0.self_attn.o_proj"
    before = groups_of(learner, [linear])
    stay = nn.functional.one_hot(before, 2).float()  # costs more where it is
    for costs in (-stay, -stay, stay):
        (learner.masks()[linear].cost * costs).sum().backward()
        learner.update()
    assert torch.equal(groups_of(learner, [linear]), before)
    for _ in range(3):
        (learner.masks()[linear].cost * stay).sum().backward()
        learner.update()
    assert not torch.equal(groups_of(learner, [linear]), before)


def test_channels_move_inside_their_blocks_only(
    problem: Problem, generator: torch.Generator
) -> None:
    start = as_it_is(problem)
    learner = learner_of(problem, start, block_size=8)
    learn_anything(learner, generator, steps=8)
    for perm in learner.solution().perms.values():
        assert torch.equal(perm // 8, torch.arange(len(perm)) // 8)


@pytest.mark.parametrize("limit", [None, 7, 50])
def test_consumers_share_the_sample_of_their_space(
    problem: Problem, start: Solution, limit: int | None
) -> None:
    learner = learner_of(problem, start, row_limit=limit)
    for step in (1, 2):
        learner.prepare(step)
        masks = learner.masks()
        for space in problem.spaces.values():
            total = sum(space.rows)
            stride = -(-total // (limit or total))
            rows, first = [], 0
            for consumer, score in space.parts():
                of_consumer = range(len(score))[masks[consumer.name].rows]
                rows += [first + row for row in of_consumer]
                first += len(score)
            assert rows == list(range(total))[step % stride :: stride]
            assert len(rows) <= (limit or total)


def test_samples_of_consecutive_steps_take_every_row_once(
    problem: Problem, start: Solution
) -> None:
    learner = learner_of(problem, start, row_limit=10)
    taken = []
    for step in range(1, 5):  # 32 rows, 10 at a time
        learner.prepare(step)
        mask = learner.masks()["model.layers.0.mlp.down_proj"]
        taken += range(len(mask.score))[mask.rows]
    assert sorted(taken) == list(range(32))


@pytest.mark.parametrize("limit", [None, 7])
def test_steps_that_weigh_other_rows_are_no_graph(
    problem: Problem, start: Solution, limit: int | None
) -> None:
    assert learner_of(problem, start, row_limit=limit).use_graph == (limit is None)
