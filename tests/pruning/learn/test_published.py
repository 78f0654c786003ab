# SPDX-License-Identifier: Apache-2.0
"""The published permutations: masks of soft and hard places, and their gradients."""

import pytest
import torch
from learning import learn_anything, leaves
from torch import Tensor

from nm_permute_plugin.maths.assignment import assign_later
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import invert
from nm_permute_plugin.pruning.learn import published
from nm_permute_plugin.pruning.learn.published import (
    SoftPlaces,
    StraightThrough,
    permuted_mask,
)
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.settings import LearnSettings

PATTERNS = ["2:4", "1:2", "1:4", "3:4", "4:8"]
ROWS, BLOCKS, GROUPS = 7, 2, 3


def random_case(pattern: NMPattern) -> tuple[Tensor, Tensor]:
    """Scores and gradients of masks, [rows, blocks, size]."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, BLOCKS, GROUPS * pattern.m)
    return torch.rand(shape, generator=generator), torch.randn(
        shape, generator=generator
    )


def hard_places(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Permutations as index vectors [blocks, size] and as matrices of zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(BLOCKS, size, generator=generator).argsort()
    places = torch.nn.functional.one_hot(order, size).transpose(-1, -2)
    return order, places.float()


@pytest.mark.parametrize("text", PATTERNS)
def test_hard_places_give_the_mask_of_the_permuted_channels(text: str) -> None:
    pattern = NMPattern.parse(text)
    score, _ = random_case(pattern)
    order, places = hard_places(score.shape[-1], seed=0)
    mask = permuted_mask(score, places, pattern)
    for block in range(BLOCKS):
        permuted = nm_mask(score[:, block, order[block]], pattern)
        expected = permuted[:, invert(order[block])].float()
        torch.testing.assert_close(mask[:, block], expected, rtol=0, atol=1e-6)


def test_the_gradient_of_a_permuted_mask_is_that_of_its_formula() -> None:
    """``top_N`` has the gradient of N times the softmax of scores over their mean."""
    pattern = NMPattern(2, 4)
    score, grad = random_case(pattern)
    _, places = hard_places(score.shape[-1], seed=1)
    ours, plain = (places.clone().requires_grad_(True) for _ in range(2))
    permuted_mask(score, ours, pattern).backward(grad)
    groups = (score.transpose(0, 1) @ plain).unflatten(-1, (GROUPS, pattern.m))
    scale = groups.detach().mean(-1, keepdim=True)
    soft = pattern.n * torch.softmax(groups / scale, dim=-1)
    hard = torch.zeros_like(soft).scatter_(
        -1, groups.detach().topk(pattern.n, dim=-1).indices, 1.0
    )
    top = (hard + soft - soft.detach()).flatten(-2)
    (top @ plain.transpose(-1, -2)).transpose(0, 1).backward(grad)
    assert float(ours.grad.abs().max()) > 0
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_rows_of_zeros_leave_the_gradient_finite() -> None:
    score, grad = random_case(NMPattern(2, 4))
    score[2] = 0
    _, places = hard_places(score.shape[-1], seed=1)
    places.requires_grad_(True)
    permuted_mask(score, places, NMPattern(2, 4)).backward(grad)
    assert bool(torch.isfinite(places.grad).all())


def test_reordering_has_the_gradient_of_indexing(generator: torch.Generator) -> None:
    matrix = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    perm = torch.randperm(6, generator=generator)
    reorder = published._Reorder.apply
    assert torch.equal(reorder(matrix, perm), matrix[:, perm])
    matrix.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda m: reorder(m, perm), (matrix,))


def settings(stage: str, **changes) -> LearnSettings:
    options = {"block_size": 16, "rate": 2.0, **changes}
    return LearnSettings(stages=(stage,), published=options)


@pytest.mark.parametrize("learner", [SoftPlaces, StraightThrough])
def test_masks_have_the_dtype_of_the_weights(
    tiny_model, make_problem, start: Solution, learner: type[SoftPlaces]
) -> None:
    problem = make_problem(tiny_model("llama", dtype=torch.bfloat16))
    made = learner(problem, start, settings("soft"), steps=8)
    masks = made.masks()
    assert {mask.dtype for mask in masks.values()} == {torch.bfloat16}
    sum(mask.float().square().sum() for mask in masks.values()).backward()
    assert {logits.grad.dtype for logits in leaves(made)} == {torch.float32}


def test_soft_masks_keep_n_of_m_on_the_average(
    problem: Problem, start: Solution, generator: torch.Generator
) -> None:
    soft = settings("soft", rate=0.5, sinkhorn_iterations=100, temperature=(1.0, 1.0))
    learner = SoftPlaces(problem, start, soft, steps=8)
    learn_anything(learner, generator)
    soft_values = []
    for mask in learner.masks().values():
        assert float(mask.detach().min()) >= -1e-5
        assert float(mask.detach().max()) <= 1 + 1e-5
        assert float(mask.detach().mean()) == pytest.approx(0.5, abs=1e-4)
        soft_values.append(((mask > 0.01) & (mask < 0.99)).float().mean())
    assert max(soft_values) > 0.1


def test_the_matching_cools_down(problem: Problem, start: Solution) -> None:
    """Without gradients, logits stay as they are, and masks become harder."""
    soft = settings("soft", temperature=(2.0, 0.05))
    learner = SoftPlaces(problem, start, soft, steps=3)
    hardness = []
    for step in (1, 2, 3):
        learner.prepare(step)
        masks = [mask.detach() for mask in learner.masks().values()]
        hardness.append(float(sum((mask - 0.5).abs().sum() for mask in masks)))
        learner.update()
    assert hardness == sorted(hardness)
    assert hardness[2] > 1.5 * hardness[0]


@pytest.mark.parametrize("learner", [SoftPlaces, StraightThrough])
def test_channels_are_assigned_once_a_step_by_the_newest_logits(
    problem: Problem,
    start: Solution,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    learner: type[SoftPlaces],
) -> None:
    begun: list[Tensor] = []

    def count(benefit: Tensor):
        begun.append(benefit.detach().clone())
        return assign_later(benefit)

    monkeypatch.setattr(published, "assign_later", count)
    made = learner(problem, start, settings("soft"), steps=8)
    shapes = len(begun)
    assert shapes == len(leaves(made))
    for step in (1, 2):
        made.solution()
        learn_anything(made, generator, steps=1)
        made.solution()
        assert len(begun) == (step + 1) * shapes
        newest = {tuple(logits.shape): logits for logits in leaves(made)}
        for benefit in begun[-shapes:]:
            assert torch.equal(benefit, newest[tuple(benefit.shape)].detach())
