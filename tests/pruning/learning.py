# SPDX-License-Identifier: Apache-2.0
"""What the tests of learning share: settings, data, starts, and what a learner holds."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nm_permute_plugin.pruning.learn.loop import Learner
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.running.masked import LearnedMask
from nm_permute_plugin.pruning.settings import LearnSettings, Settings


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


def fast(*stages: str, steps: int | tuple[int, ...] = 4, **changes) -> Settings:
    """Few steps of the stages, at high rates."""
    groups: dict[str, object] = {
        "multipliers": {"rate": 0.1},
        "swaps": {"block_size": 16},
        "soft": {"block_size": 16, "rate": 0.1},
        "straight_through": {"block_size": 16, "rate": 0.1},
    }
    of_stages = {
        stage if stage in LearnSettings.model_fields else "published": groups[stage]
        for stage in stages
    }
    learn = {"stages": stages, "steps": steps, **of_stages}
    return Settings(**{"learn": learn, "validation": {"every": 2}, **changes})


def text(rows: int, seed: int) -> list[Mapping[str, Tensor]]:
    """Batches of two rows of eight tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(48, (rows, 8), generator=generator)
    return [{"input_ids": part} for part in tokens.split(2)]


def on(problem: Problem, **changes) -> Problem:
    """The problem with other data."""
    return replace(problem, data=replace(problem.data, **changes))
