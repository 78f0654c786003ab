# SPDX-License-Identifier: Apache-2.0
"""Swaps of channels between groups: what the gradient foretells, and what is true."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nm_permute_plugin.maths.mask_gradients import insertion_costs
from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.pruning.learn.loop import frozen
from nm_permute_plugin.pruning.problem import Learned
from nm_permute_plugin.pruning.running.backward import BackwardStep
from nm_permute_plugin.pruning.running.loss import LossWeights, loss, run
from nm_permute_plugin.pruning.running.masked import masked
from nm_permute_plugin.pruning.stacking import StackedScore
from nm_permute_plugin.pruning.statistics import Batch, on_device
from subject import Started

Pair = tuple[int, int]
"""Two places of an order, in different groups."""


@dataclass(frozen=True)
class Tried:
    """
    Changes of the loss by a few swaps made together.

    :param costs: foretold by the costs that learning works with (``insertion_costs``)
    :param linear: foretold by the gradient of the masks for the masks that come out
    :param true: measured, on the batch of the gradient
    :param elsewhere: measured, on another batch
    """

    costs: float
    linear: float
    true: float
    elsewhere: float


class Judge:
    """The loss of masks on one batch; the dense model runs only once."""

    def __init__(self, subject: Started, batch: Batch, weights: LossWeights) -> None:
        self._model, self._weights = subject.model, weights
        self._batch = on_device(batch, subject.model)
        with torch.no_grad():
            self._dense = run(self._model, self._batch, weights)

    def __call__(self, masks: dict[str, Tensor]) -> float:
        with torch.no_grad(), masked(self._model, masks):
            ours = run(self._model, self._batch, self._weights)
            return float(loss(ours, self._dense, self._batch, self._weights))


class Swaps:
    """
    Swaps in one space, from the start of learning.

    :param name: of the space
    :param batches: the one that gives the gradient, and another
    """

    def __init__(
        self,
        subject: Started,
        name: str,
        batches: tuple[Batch, Batch],
        weights: LossWeights,
    ) -> None:
        self._subject, self._stack = subject, subject.stacks[name]
        self._start = subject.start[name]
        self._judges = [Judge(subject, batch, weights) for batch in batches]
        self._masks = subject.masks(Learned(subject.start))
        self._before = [judge(self._masks) for judge in self._judges]
        self._grads = _mask_gradients(subject, self._masks, batches[0], weights)
        size, m = self._stack.space.size, subject.pattern.m
        self._column = torch.arange(size, device=self._start.device) // m
        self.foretold = self._table()
        upper = torch.triu_indices(size, size, offset=1).T
        self._pairs = upper[self.foretold[upper[:, 0], upper[:, 1]].isfinite()]

    def _table(self) -> Float[Tensor, "size size"]:
        """The foretold change of every swap of two places; infinite where there is none."""
        stack, column = self._stack, self._column
        grads = {r.name: self._grads[r.name].float() for r in stack.space.consumers}
        grad = StackedScore.of(stack.space, grads).score
        score, grad = (x[:, self._start][:, None] for x in (stack.score, grad))
        costs = insertion_costs(score, grad, column[None], self._subject.pattern)[0]
        moved = costs[:, column] - costs.gather(1, column[:, None])
        table = moved + moved.T
        segment = torch.arange(len(column), device=column.device) // stack.space.segment
        never = (column[:, None] == column) | (segment[:, None] != segment)
        return table.masked_fill(never, torch.inf).cpu()

    def random(
        self, sets: int, together: int, generator: torch.Generator
    ) -> list[list[Pair]]:
        """Sets of swaps, chosen by chance."""
        order = torch.randperm(len(self._pairs), generator=generator)
        return _dealt(self._pairs[order], self._column, sets, together)

    def best(self, sets: int, together: int) -> list[list[Pair]]:
        """Sets of those swaps that are foretold to help the most."""
        first, second = self._pairs.T
        order = self.foretold[first, second].argsort()
        return _dealt(self._pairs[order], self._column, sets, together)

    def try_out(self, pairs: list[Pair]) -> Tried:
        """Make the swaps, all at once, and look."""
        perm: Permutation = self._start.clone()
        for first, second in pairs:
            perm[[first, second]] = perm[[second, first]]
        masks = self._masks | self._stack.masks(perm, self._subject.pattern)
        linear = 0.0
        for consumer in self._stack.space.consumers:
            grad = self._grads[consumer.name].double()
            change = masks[consumer.name].double() - self._masks[consumer.name].double()
            linear += float((grad * change).sum())
        after = [judge(masks) for judge in self._judges]
        return Tried(
            sum(float(self.foretold[pair]) for pair in pairs),
            linear,
            after[0] - self._before[0],
            after[1] - self._before[1],
        )


def _mask_gradients(
    subject: Started, masks: dict[str, Tensor], batch: Batch, weights: LossWeights
) -> dict[str, Tensor]:
    """The gradient of the loss with respect to every mask."""
    leaves = {
        name: mask.to(subject.dtype).requires_grad_(True)
        for name, mask in masks.items()
    }
    with frozen(subject.model), torch.enable_grad():
        BackwardStep(subject.model, lambda: leaves, weights)(batch)
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _dealt(
    pairs: Int[Tensor, "pairs 2"],
    column: Int[Tensor, " size"],
    sets: int,
    together: int,
) -> list[list[Pair]]:
    """The first pairs in sets, no group twice in a set; a set may stay short."""
    group = column.tolist()
    dealt: list[list[Pair]] = [[] for _ in range(sets)]
    touched: list[set[int]] = [set() for _ in range(sets)]
    for first, second in pairs[: 20 * sets * together].tolist():
        groups = {group[first], group[second]}
        for few, seen in zip(dealt, touched, strict=True):
            if len(few) < together and not groups & seen:
                few.append((first, second))
                seen |= groups
                break
    return [few for few in dealt if few]
