# SPDX-License-Identifier: Apache-2.0
"""Spaces of one shape side by side: all layers of a model are permuted as one tensor."""

from collections import defaultdict
from collections.abc import Collection

import torch
from jaxtyping import Int
from torch import Tensor

from nm_permute_plugin.maths.assignment import order_by
from nm_permute_plugin.maths.permutation import Permutation, compose, from_blocks
from nm_permute_plugin.pruning.problem import Problem, Solution, SpaceScores
from nm_permute_plugin.pruning.settings import PublishedSettings, SwapSettings


class SameShape:
    """
    Spaces with equally many rows whose channels mix in blocks of one size.

    :param start: its permutations say which channels are in a block
    :param size: channels of a block
    :ivar starts: the channels block by block, by space
    :ivar counts: how many blocks each space has
    """

    def __init__(self, spaces: list[SpaceScores], start: Solution, size: int) -> None:
        self.spaces, self.size = spaces, size
        self.device = spaces[0].score.device
        self.starts = [start.perms[of.space.name].to(self.device) for of in spaces]
        self.counts = [of.space.size // size for of in spaces]

    def perms(self, column: Int[Tensor, "blocks size"]) -> dict[str, Permutation]:
        """
        The permutations, by space, that order the channels of every block.

        :param column: of each channel in its block: a group, or a place
        """
        orders = order_by(column).split(self.counts)
        return {
            of.space.name: compose(start, from_blocks(order))
            for of, start, order in zip(self.spaces, self.starts, orders, strict=True)
        }


def same_shapes(
    problem: Problem,
    start: Solution,
    settings: SwapSettings | PublishedSettings,
    fixed: Collection[str],
) -> list[SameShape]:
    """
    The spaces of a problem, those of one shape together.

    :param settings: say how large blocks are
    :param fixed: spaces that are left out
    """
    alike: dict[tuple[object, ...], list[SpaceScores]] = defaultdict(list)
    for name, of in problem.spaces.items():
        if name not in fixed:
            size = settings.size_in(of.space.segment, problem.pattern.m)
            alike[of.rows, of.queries, size].append(of)
    return [
        SameShape(
            spaces,
            start,
            settings.size_in(spaces[0].space.segment, problem.pattern.m),
        )
        for spaces in alike.values()
    ]


def fixed_masks(
    problem: Problem, start: Solution, fixed: Collection[str]
) -> dict[str, Tensor]:
    """
    The masks that do not learn: of linears without a space, and of the fixed spaces.

    :param start: its permutations are those of the fixed spaces
    """
    masks: dict[str, Tensor] = dict(problem.fixed_masks)
    for name in fixed:
        perm = start.perms[name].to(torch.device(problem.device))
        masks |= problem.spaces[name].masks(perm, problem.pattern, Solution())
    return masks
