# SPDX-License-Identifier: Apache-2.0
"""All consumers of a space as one matrix: their scores stand one below the other."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, invert
from nm_permute_plugin.specs.spec import Consumer, Space


@dataclass(frozen=True)
class StackedScore:
    """
    The scores of every weight that reads a space, one column a channel.

    :param rows: how many rows each consumer has, in the order of ``space.consumers``
    :param weights: what the scores of every row count where rows disagree about an order;
        all count alike by default. Masks are made row by row and do not depend on it
    """

    space: Space
    score: Float[Tensor, "rows channels"]
    rows: tuple[int, ...]
    weights: Float[Tensor, " rows"] | None = None

    @classmethod
    def of(
        cls,
        space: Space,
        scores: Mapping[str, Float[Tensor, "_out _in"]],
        weights: Mapping[str, Float[Tensor, " _out"]] | None = None,
    ) -> "StackedScore":
        """
        :param scores: by the name of the linear; every consumer of the space has one
        :param weights: of the rows of every linear
        """
        views = [consumer.view(scores[consumer.name]) for consumer in space.consumers]
        of_rows = None
        if weights is not None:
            parts = [weights[r.name].repeat(r.queries) for r in space.consumers]
            of_rows = torch.cat(parts)
        rows = tuple(len(view) for view in views)
        return cls(space, torch.cat(views), rows, of_rows)

    def sections(self, most: int | None) -> tuple[int, ...]:
        """
        Into how many sections each consumer is cut: rows that share multipliers.

        A section is one query head's, and as long as may be: it divides the rows.

        :param most: rows of a section; None: all
        """
        counts = []
        for consumer, rows in zip(self.space.consumers, self.rows, strict=True):
            of_query = rows // consumer.queries
            least = 1 if most is None else -(-of_query // most)
            runs = next(n for n in range(least, of_query + 1) if of_query % n == 0)
            counts.append(consumer.queries * runs)
        return tuple(counts)

    def multipliers(
        self, by_section: Float[Tensor, "sections channels"], most: int | None
    ) -> dict[str, Float[Tensor, "_runs _in"]]:
        """Of every consumer, one row a run of its rows, from one a section."""
        parts = by_section.split(list(self.sections(most)))
        return {
            consumer.name: consumer.unview(part)
            for consumer, part in zip(self.space.consumers, parts, strict=True)
        }

    def split(
        self, stacked: Shaped[Tensor, "rows channels"]
    ) -> dict[str, Shaped[Tensor, "out in"]]:
        """A stacked matrix, consumer by consumer."""
        parts = stacked.split(list(self.rows))
        return {
            consumer.name: consumer.unview(part)
            for consumer, part in zip(self.space.consumers, parts, strict=True)
        }

    def to(self, device: torch.device) -> "StackedScore":
        """The same, its scores on a device."""
        return replace(self, score=self.score.to(device))

    def parts(self) -> list[Float[Tensor, "_rows channels"]]:
        """The rows of each consumer, in the order of ``space.consumers``; no copies."""
        return list(self.score.split(list(self.rows)))

    def masks(
        self,
        order: Permutation,
        pattern: NMPattern,
        multipliers: Mapping[str, Float[Tensor, "_runs _in"]] | None = None,
    ) -> dict[str, Bool[Tensor, "_out _in"]]:
        """
        The N:M masks of all consumers under an order, in the channels' old places.

        :param multipliers: by consumer, as for ``mask_in_order``; 1 by default
        """
        factors = multipliers or {}
        return {
            consumer.name: consumer.unview(
                mask_in_order(
                    consumer, score, order, pattern, factors.get(consumer.name)
                )
            )
            for consumer, score in zip(self.space.consumers, self.parts(), strict=True)
        }


def mask_in_order(
    consumer: Consumer,
    score: Float[Tensor, "rows channels"],
    order: Permutation,
    pattern: NMPattern,
    multipliers: Float[Tensor, "runs in"] | None = None,
) -> Bool[Tensor, "rows channels"]:
    """
    The N:M mask of one consumer under an order, in the channels' old places.

    It is made where the order is, and kept where the score is.

    :param score: as the consumer views its weight
    :param multipliers: of the scores of every input channel, one row for each of equally
        long runs of the weight's rows; 1 by default
    """
    stored, score = score.device, score.to(order.device)
    if multipliers is not None:
        factors = consumer.view(multipliers)
        sections = score.unflatten(0, (len(factors), -1))
        score = (sections * factors[:, None]).flatten(0, 1)
    mask = nm_mask(score[:, order], pattern)[:, invert(order)]
    return mask.to(stored)
