# SPDX-License-Identifier: Apache-2.0
"""The orders of all spaces as parameters: what says which channels go together."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nm_permute_plugin.maths.assignment import assign_later, order_by
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import (
    Permutation,
    compose,
    from_blocks,
    invert,
)
from nm_permute_plugin.maths.sinkhorn import sinkhorn
from nm_permute_plugin.training.grouping import Grouping
from nm_permute_plugin.training.insertion import InsertionMask
from nm_permute_plugin.training.masking import Mask
from nm_permute_plugin.training.relaxation import Reorder, RowSample, permuted_mask
from nm_permute_plugin.training.stacking import StackedScore
from nm_permute_plugin.training.swapping import swap

Relaxation = Literal["insertion", "straight_through", "soft"]
Learns = Literal["order", "multipliers"]
"""What learns at a time."""

MEMORY = 0.8
"""The share of the moves' average costs that a step leaves as it was."""


@dataclass(frozen=True)
class OrderShape:
    """
    How an order is parametrised.

    :param block_size: channels that may mix; a multiple of M
    :param groups: instead of ``block_size``: into how many blocks a space is cut
    :param relaxation: ``insertion``: hard groups, the cost of every single move;
        ``straight_through``: hard places, the soft matching's gradient
        (https://arxiv.org/abs/2510.10136); ``soft``: soft places while training, hard at
        the end (https://arxiv.org/abs/2601.22980)
    :param start_logit: how firmly a channel starts in its place; not of ``insertion``
    :param sinkhorn_iterations: row and column normalisations; not of ``insertion``
    :param row_limit: rows of a space that weigh the moves of a step; None: all of them
    :param multipliers: learn what every input channel's scores are multiplied by as well
    :param multiplier_rows: rows of a linear that share multipliers; None: all of them
    """

    block_size: int = 64
    groups: int | None = None
    relaxation: Relaxation = "insertion"
    start_logit: float = 0.3
    sinkhorn_iterations: int = 10
    row_limit: int | None = None
    multipliers: bool = False
    multiplier_rows: int | None = 16

    def size_in(self, wall: int, m: int) -> int:
        """
        The block's size in a run of ``wall`` channels: the largest multiple of M that
        divides the run and is no larger than asked for.

        >>> OrderShape(block_size=64).size_in(576, 4), OrderShape(groups=4).size_in(60, 4)
        (64, 12)
        """
        wanted = self.block_size if self.groups is None else wall // self.groups
        sizes = range(m, min(max(wanted, m), wall) + 1, m)
        return max(size for size in sizes if wall % size == 0)


class LearnableOrders:
    """
    The orders of all spaces while they are learned.

    ``orders.at(temperature, step).masks()`` are the masks of a step. Tensors stay where
    they are from step to step, so that a captured CUDA graph of the masks finds them.

    :param stacks: the scores of all readers, by space
    :param start: the orders to begin with, by space
    :param dtype: of masks that are tensors: that of the weights
    :param fixed: spaces that keep the order they begin with; multipliers are learned
    """

    def __init__(
        self,
        stacks: Mapping[str, StackedScore],
        start: Mapping[str, Permutation],
        pattern: NMPattern,
        shape: OrderShape,
        dtype: torch.dtype,
        fixed: Collection[str] = (),
    ) -> None:
        alike: dict[tuple[object, object, int, bool], list[StackedScore]] = defaultdict(
            list
        )
        for name, stack in stacks.items():
            size = shape.size_in(stack.space.wall, pattern.m)
            sections = stack.sections(shape.multiplier_rows)
            alike[stack.rows, sections, size, name in fixed].append(stack)
        self.bundles: list[_Bundle] = []
        for (_, _, size, is_fixed), same in alike.items():
            kind: type[_Bundle] = _Insertions
            if shape.relaxation != "insertion" and not is_fixed:
                kind = _Places
            self.bundles.append(
                kind(same, start, size, pattern, shape, dtype, is_fixed)
            )

    @property
    def learners(self) -> list[Learns]:
        """What can learn here."""
        every: list[Learns] = ["order", "multipliers"]
        return [x for x in every if any(x in b.learners for b in self.bundles)]

    def groups(self) -> list[Int[Tensor, "_blocks _size"]]:
        """Which channels are grouped, for ``regroup``; not those of logits."""
        return [b.column.clone() for b in self.bundles if isinstance(b, _Insertions)]

    def regroup(self, groups: Sequence[Int[Tensor, "_blocks _size"]]) -> None:
        """Group the channels as they were grouped before."""
        bundles = [b for b in self.bundles if isinstance(b, _Insertions)]
        for bundle, column in zip(bundles, groups, strict=True):
            bundle.column.copy_(column)

    def learn(self, what: Learns) -> None:
        """Let the orders, or the multipliers, have gradients, and not the others."""
        for bundle in self.bundles:
            bundle.learn(what)

    def logits(self) -> list[nn.Parameter]:
        """Of places, [blocks, size, size], one tensor for all spaces of a shape."""
        return [b.choice for b in self.bundles if isinstance(b, _Places)]

    def log_multipliers(self) -> list[nn.Parameter]:
        """What is learned of the scores, [sections, blocks, size]."""
        return [bundle.log_multiplier for bundle in self.bundles]

    def swap(self, share: float) -> None:
        """
        Swap two channels of a block where that promises most, and clear the gradients.

        :param share: of the blocks of all spaces of a shape, at most
        """
        for bundle in self.bundles:
            if isinstance(bundle, _Insertions):
                bundle.swap(share)

    def multipliers(self) -> dict[str, Float[Tensor, "_runs _in"]]:
        """
        What the scores of every input channel are multiplied by, by linear.

        One row for each of equally long runs of the weight's rows.
        """
        found: dict[str, Float[Tensor, "_runs _in"]] = {}
        for bundle in self.bundles:
            found |= bundle.multipliers()
        return found

    def assign(self) -> None:
        """Begin to make logits hard, after every change: the next masks need it."""
        for bundle in self.bundles:
            bundle.assign()

    def perms(self) -> dict[str, Permutation]:
        """The orders as they stand, hard, by space."""
        found: dict[str, Permutation] = {}
        for bundle in self.bundles:
            found |= bundle.perms()
        return found

    def at(self, temperature: float, step: int) -> "LearnableOrders":
        """
        These orders, ready for the masks of a step.

        :param temperature: of the matching
        :param step: chooses the rows that weigh the moves
        """
        for bundle in self.bundles:
            bundle.at(temperature, step)
        return self

    def masks(self) -> dict[str, Mask]:
        """The masks of all readers, by linear, with gradients for what learns."""
        masks: dict[str, Mask] = {}
        for bundle in self.bundles:
            masks |= bundle.masks()
        return masks

    @property
    def steps_differ(self) -> bool:
        """Whether the masks of a step are made by other operations than the next one's."""
        return any(
            bundle.sample_of(0) != bundle.sample_of(1) for bundle in self.bundles
        )


class _Bundle(nn.Module):
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


class _Insertions(_Bundle):
    """
    Columns are groups: one mask a reader.

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
            rows, readers, sample = stack.parts(), stack.space.readers, self.sample
            grouping = Grouping(start, column, self.pattern)
            of_readers = logs.split(self.sections)
            for reader, score, log in zip(readers, rows, of_readers, strict=True):
                masks[reader.name] = InsertionMask(
                    reader, score, grouping, choice, log, sample
                )
                sample = sample.after(len(score))
        return masks


class _Places(_Bundle):
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
