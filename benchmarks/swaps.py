# SPDX-License-Identifier: Apache-2.0
"""Swaps of channels between groups: what the gradient foretells, and what is true."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.maths.swaps import move_costs
from nm_permute_plugin.pruning.data import Batch
from nm_permute_plugin.pruning.problem import Problem, Solution, SpaceScores
from nm_permute_plugin.pruning.running.backward import Backward
from nm_permute_plugin.pruning.running.masked import frozen
from nm_permute_plugin.pruning.settings import MemorySettings
from subject import Started

Pair = tuple[int, int]
"""Two places of a permutation, in different groups."""


@dataclass(frozen=True)
class Tried:
    """
    Changes of the loss by a few swaps made together.

    :param costs: foretold by the costs that learning works with (``move_costs``)
    :param linear: foretold by the gradient of the masks for the masks that come out
    :param true: measured, on the batch of the gradient
    :param elsewhere: measured, on another batch
    """

    costs: float
    linear: float
    true: float
    elsewhere: float


class Swaps:
    """
    Swaps in one space, from the start of learning.

    :param name: of the space
    :param batches: the one that gives the gradient, and another
    """

    def __init__(
        self, subject: Started, name: str, batches: tuple[Batch, Batch]
    ) -> None:
        self._problem, self._space = subject.problem, subject.problem.spaces[name]
        self._start, self._batches = subject.start.perms[name], batches
        self._masks = self._problem.masks(subject.start)
        self._before = self._losses(self._masks)
        self._grads = _mask_gradients(self._problem, self._masks, batches[0])
        size, m = self._space.space.size, self._problem.pattern.m
        self._group_of = torch.arange(size, device=self._start.device) // m
        self.foretold = self._table()
        upper = torch.triu_indices(size, size, offset=1).T
        self._pairs = upper[self.foretold[upper[:, 0], upper[:, 1]].isfinite()]

    def _losses(self, masks: dict[str, Tensor]) -> list[float]:
        """The loss under masks on each of the batches."""
        validate = self._problem.teacher.validate
        return [validate(masks, [batch]) for batch in self._batches]

    def _table(self) -> Float[Tensor, "size size"]:
        """The foretold change of every swap of two places; infinite where there is none."""
        space, group_of = self._space.space, self._group_of
        grads = {c.name: self._grads[c.name].float() for c in space.consumers}
        grad = SpaceScores.of(space, grads).score
        score, grad = (x[:, self._start][:, None] for x in (self._space.score, grad))
        costs = move_costs(score, grad, group_of[None], self._problem.pattern)[0]
        moved = costs[:, group_of] - costs.gather(1, group_of[:, None])
        table = moved + moved.T
        segment = torch.arange(space.size, device=group_of.device) // space.segment
        never = (group_of[:, None] == group_of) | (segment[:, None] != segment)
        return table.masked_fill(never, torch.inf).cpu()

    def random(
        self, sets: int, together: int, generator: torch.Generator
    ) -> list[list[Pair]]:
        """Sets of swaps, chosen by chance."""
        order = torch.randperm(len(self._pairs), generator=generator)
        return _in_sets(self._pairs[order], self._group_of, sets, together)

    def best(self, sets: int, together: int) -> list[list[Pair]]:
        """Sets of those swaps that are foretold to help the most."""
        first, second = self._pairs.T
        order = self.foretold[first, second].argsort()
        return _in_sets(self._pairs[order], self._group_of, sets, together)

    def try_out(self, pairs: list[Pair]) -> Tried:
        """Make the swaps, all at once, and see what becomes of the loss."""
        perm: Permutation = self._start.clone()
        for first, second in pairs:
            perm[[first, second]] = perm[[second, first]]
        masks = self._masks | self._space.masks(perm, self._problem.pattern, Solution())
        linear = 0.0
        for consumer in self._space.space.consumers:
            grad = self._grads[consumer.name].double()
            change = masks[consumer.name].double() - self._masks[consumer.name].double()
            linear += float((grad * change).sum())
        after = self._losses(masks)
        return Tried(
            sum(float(self.foretold[pair]) for pair in pairs),
            linear,
            after[0] - self._before[0],
            after[1] - self._before[1],
        )


def _mask_gradients(
    problem: Problem, masks: dict[str, Tensor], batch: Batch
) -> dict[str, Tensor]:
    """The gradient of the loss with respect to every mask."""
    leaves = {
        name: mask.to(problem.dtype).requires_grad_(True)
        for name, mask in masks.items()
    }
    memory = MemorySettings()
    with frozen(problem.model), torch.enable_grad():
        given = leaves.values(), [batch], memory
        Backward(problem.teacher, lambda: leaves, *given, use_graph=False)(batch)
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _in_sets(
    pairs: Int[Tensor, "pairs 2"],
    group_of: Int[Tensor, " size"],
    sets: int,
    together: int,
) -> list[list[Pair]]:
    """The first pairs in sets, no group twice in a set; a set may stay short."""
    group = group_of.tolist()
    found: list[list[Pair]] = [[] for _ in range(sets)]
    touched: list[set[int]] = [set() for _ in range(sets)]
    for first, second in pairs[: 20 * sets * together].tolist():
        groups = {group[first], group[second]}
        for few, seen in zip(found, touched, strict=True):
            if len(few) < together and not groups & seen:
                few.append((first, second))
                seen |= groups
                break
    return [few for few in found if few]
