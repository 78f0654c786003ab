# SPDX-License-Identifier: Apache-2.0
"""What the tests of learning share: starts, and what a learner holds."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nm_permute_plugin.pruning.learn.loop import Learner
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.running.masked import LearnedMask


def as_it_is(problem: Problem) -> Solution:
    """The channels of all spaces in their places."""
    spaces = problem.spaces.items()
    return Solution({name: torch.arange(of.space.size) for name, of in spaces})


def learned(learner: Learner) -> Iterator[Tensor]:
    """Whatever needs a gradient of what a learner's masks are, or are made from."""
    for mask in learner.masks().values():
        tensors = mask.parameters if isinstance(mask, LearnedMask) else (mask,)
        yield from (tensor for tensor in tensors if tensor.requires_grad)


def leaves(learner: Learner) -> list[Tensor]:
    """The parameters that a learner's masks depend on."""
    found: dict[int, Tensor] = {}
    seen: set[object] = set()
    todo: list[object] = [tensor.grad_fn or tensor for tensor in learned(learner)]
    while todo:
        node = todo.pop()
        leaf = node if isinstance(node, Tensor) else getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        elif node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions if before is not None]
    return list(found.values())


def learn_anything(
    learner: Learner, generator: torch.Generator, steps: int = 5
) -> None:
    """Steps along random gradients."""
    for step in range(1, steps + 1):
        learner.prepare(step)
        towards = [
            (tensor * torch.randn(tensor.shape, generator=generator)).sum()
            for tensor in learned(learner)
        ]
        sum(towards).backward()
        learner.update()
