# SPDX-License-Identifier: Apache-2.0
"""The orders of all spaces as parameters: what says which channels go together."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.pruning.learn.bundles import Bundle, Insertions, Places
from nm_permute_plugin.pruning.learn.order_shape import Learns, OrderShape
from nm_permute_plugin.pruning.running.masked import Mask
from nm_permute_plugin.pruning.stacking import StackedScore


class LearnableOrders:
    """
    The orders of all spaces while they are learned.

    ``orders.at(temperature, step).masks()`` are the masks of a step. Tensors stay where
    they are from step to step, so that a captured CUDA graph of the masks finds them.

    :param stacks: the scores of all consumers, by space
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
            size = shape.size_in(stack.space.segment, pattern.m)
            sections = stack.sections(shape.multiplier_rows)
            alike[stack.rows, sections, size, name in fixed].append(stack)
        self.bundles: list[Bundle] = []
        for (_, _, size, is_fixed), same in alike.items():
            kind: type[Bundle] = Insertions
            if shape.relaxation != "insertion" and not is_fixed:
                kind = Places
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
        return [b.column.clone() for b in self.bundles if isinstance(b, Insertions)]

    def regroup(self, groups: Sequence[Int[Tensor, "_blocks _size"]]) -> None:
        """Group the channels as they were grouped before."""
        bundles = [b for b in self.bundles if isinstance(b, Insertions)]
        for bundle, column in zip(bundles, groups, strict=True):
            bundle.column.copy_(column)

    def learn(self, what: Learns) -> None:
        """Let the orders, or the multipliers, have gradients, and not the others."""
        for bundle in self.bundles:
            bundle.learn(what)

    def logits(self) -> list[nn.Parameter]:
        """Of places, [blocks, size, size], one tensor for all spaces of a shape."""
        return [b.choice for b in self.bundles if isinstance(b, Places)]

    def log_multipliers(self) -> list[nn.Parameter]:
        """What is learned of the scores, [sections, blocks, size]."""
        return [bundle.log_multiplier for bundle in self.bundles]

    def swap(self, share: float) -> None:
        """
        Swap two channels of a block where that promises most, and clear the gradients.

        :param share: of the blocks of all spaces of a shape, at most
        """
        for bundle in self.bundles:
            if isinstance(bundle, Insertions):
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
        """The masks of all consumers, by linear, with gradients for what learns."""
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
