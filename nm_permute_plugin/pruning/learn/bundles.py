# SPDX-License-Identifier: Apache-2.0
"""The orders of spaces of one shape, side by side in one tensor while they are learned."""

from collections.abc import Callable, Mapping
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nm_permute_plugin.maths.assignment import assign_later, order_by
from nm_permute_plugin.maths.mask_gradients import Reorder, RowSample, permuted_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import (
    Permutation,
    compose,
    from_blocks,
    invert,
)
from nm_permute_plugin.maths.sinkhorn import sinkhorn
from nm_permute_plugin.maths.swaps import swap
from nm_permute_plugin.pruning.learn.grouping import Grouping
from nm_permute_plugin.pruning.learn.insertion import InsertionMask
from nm_permute_plugin.pruning.learn.order_shape import Learns, OrderShape
from nm_permute_plugin.pruning.running.masked import Mask
from nm_permute_plugin.pruning.stacking import StackedScore

MEMORY = 0.8
"""The share of the moves' average costs that a step leaves as it was."""


class Bundle(nn.Module):
    """
    Spaces with equally many rows and blocks of one size, side by side in one tensor.

    All layers of a model have the same shape: one matching and one assignment serve them
    together.

    :ivar choice: [blocks, size, columns], whose gradients say which channels go together
    :ivar column: that of each channel, as the masks of a step have it
    """

    def __init__(
        self,
        stacks: list[StackedScore],
        start: Mapping[str, Permutation],
        size: int,
        pattern: NMPattern,
        shape: OrderShape,
        dtype: torch.dtype,
        fixed: bool,
    ) -> None:
        super().__init__()
        self.stacks, self.pattern, self.shape, self.dtype, self.fixed = (
            stacks,
            pattern,
            shape,
            dtype,
            fixed,
        )
        device = stacks[0].score.device
        self.starts = [start[stack.space.name].to(device) for stack in stacks]
        self.counts = [stack.space.size // size for stack in stacks]
        self.sections = list(stacks[0].sections(shape.multiplier_rows))
        columns = self.columns(size)
        own = torch.arange(size, device=device) * columns // size
        self.column = own.repeat(sum(self.counts), 1)
        self.choice = nn.Parameter(self.first(columns))
        self.log_multiplier = nn.Parameter(
            self.choice.new_zeros(sum(self.sections), sum(self.counts), size)
        )
        self.temperature = torch.ones((), device=device)
        self.sample = self.sample_of(0)
        self.learn("multipliers" if "multipliers" in self.learners else "order")

    @property
    def learners(self) -> set[Learns]:
        """What can learn here."""
        return {"order"}

    def columns(self, size: int) -> int:
        """How many a block of so many channels has."""
        raise NotImplementedError

    def first(self, columns: int) -> Float[Tensor, "blocks size columns"]:
        """What ``choice`` begins with."""
        raise NotImplementedError

    def learn(self, what: Learns) -> None:
        for parameter, of in (
            (self.choice, "order"),
            (self.log_multiplier, "multipliers"),
        ):
            parameter.requires_grad_(of == what and of in self.learners)

    def at(self, temperature: float, step: int) -> None:
        """Prepare the masks of a step: ``column``, ``temperature`` and ``sample``."""
        if temperature <= 0:
            raise ValueError(f"the temperature must be positive, got {temperature}")
        self.temperature.fill_(temperature)
        self.sample = self.sample_of(step)

    def sample_of(self, step: int) -> RowSample:
        """The rows that weigh the moves of a step."""
        return RowSample.of_step(sum(self.stacks[0].rows), self.shape.row_limit, step)

    def assign(self) -> None:
        """Begin to make the choice hard, if it is not."""

    def hard(self) -> Int[Tensor, "blocks size"]:
        """The column of each channel, as it is now."""
        return self.column

    def perms(self) -> dict[str, Permutation]:
        hard = order_by(self.hard()).split(self.counts)
        return {
            stack.space.name: compose(start, from_blocks(order))
            for stack, start, order in zip(self.stacks, self.starts, hard, strict=True)
        }

    def multipliers(self) -> dict[str, Float[Tensor, "_runs _in"]]:
        parts = self.log_multiplier.detach().exp().split(self.counts, dim=1)
        found: dict[str, Float[Tensor, "_runs _in"]] = {}
        for stack, start, part in zip(self.stacks, self.starts, parts, strict=True):
            factors = part.flatten(1)[:, invert(start)]
            found |= stack.multipliers(factors, self.shape.multiplier_rows)
        return found

    def masks(self) -> dict[str, Mask]:
        raise NotImplementedError


class Insertions(Bundle):
    """
    Columns are groups: one mask a consumer.

    ``choice`` stays 0: its gradient is what each move would change of the loss.
    """

    @property
    def learners(self) -> set[Learns]:
        found: set[Learns] = set() if self.fixed else {"order"}
        return found | ({"multipliers"} if self.shape.multipliers else set())

    def columns(self, size: int) -> int:
        return size // self.pattern.m

    def first(self, columns: int) -> Float[Tensor, "blocks size columns"]:
        zeros = self.column.new_zeros(
            (*self.column.shape, columns), dtype=torch.float32
        )
        self._costs = zeros.clone()
        return zeros

    def swap(self, share: float) -> None:
        gradient = self.choice.grad
        if gradient is None or self.fixed:
            return
        self._costs.lerp_(gradient, 1 - MEMORY)
        gradient.zero_()
        swap(self._costs, self.column, round(share * len(self.column)))

    def masks(self) -> dict[str, Mask]:
        masks: dict[str, Mask] = {}
        parts = zip(
            self.stacks,
            self.starts,
            self.choice.split(self.counts),
            self.column.split(self.counts),
            self.log_multiplier.split(self.counts, dim=1),
            strict=True,
        )
        for stack, start, choice, column, logs in parts:
            rows, consumers, sample = stack.parts(), stack.space.consumers, self.sample
            grouping = Grouping(start, column, self.pattern)
            of_readers = logs.split(self.sections)
            for consumer, score, log in zip(consumers, rows, of_readers, strict=True):
                masks[consumer.name] = InsertionMask(
                    consumer, score, grouping, choice, log, sample
                )
                sample = sample.after(len(score))
        return masks


class Places(Bundle):
    """
    Columns are places: soft, or hard with the soft matching's gradient.

    ``choice`` holds logits, which an optimiser changes.
    """

    def columns(self, size: int) -> int:
        return size

    def first(self, columns: int) -> Float[Tensor, "blocks size columns"]:
        self._hard: tuple[int, Callable[[], Tensor]] | None = None
        places = nn.functional.one_hot(self.column, columns).float()
        return places * self.shape.start_logit

    def at(self, temperature: float, step: int) -> None:
        super().at(temperature, step)
        self.column.copy_(self.hard())

    def assign(self) -> None:
        self._hard = self._begun()

    def _begun(self) -> tuple[int, Callable[[], Tensor]]:
        # The version tells of changes in place, but for those of fused optimisers.
        return self.choice._version, cache(assign_later(self.choice))

    def hard(self) -> Int[Tensor, "blocks size"]:
        if self._hard is None or self._hard[0] != self.choice._version:
            self._hard = self._begun()
        return self._hard[1]()

    def soft(self) -> Float[Tensor, "blocks size columns"]:
        scaled = self.choice / self.temperature
        return sinkhorn(scaled, iterations=self.shape.sinkhorn_iterations)

    def masks(self) -> dict[str, Mask]:
        soft = self.soft()
        if self.shape.relaxation == "straight_through":
            places = nn.functional.one_hot(self.column, soft.shape[-1])
            soft = places + soft - soft.detach()
        masks: dict[str, Mask] = {}
        parts = zip(self.stacks, self.starts, soft.split(self.counts), strict=True)
        for stack, start, of_stack in parts:
            blocks = stack.score[:, start].unflatten(-1, of_stack.shape[:2])
            mask = permuted_mask(blocks, of_stack, self.pattern).to(self.dtype)
            masks |= stack.split(Reorder.apply(mask.flatten(1), invert(start)))
        return masks
