# SPDX-License-Identifier: Apache-2.0
"""
What a permutation and masks are found for: a dense model, scores of its weights, and data.

``Problem.prepare`` measures them, a ``Solution`` says which permutations and
multipliers were found, and ``Problem.validate`` tells how good a solution is.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from itertools import compress

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, invert
from nm_permute_plugin.maths.scores import score_weight
from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.running.masked import linear
from nm_permute_plugin.pruning.running.teacher import Teacher, pays_to_keep
from nm_permute_plugin.pruning.session import known_run, once
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.pruning.statistics import input_norms, output_sensitivity
from nm_permute_plugin.specs.conv1d import weight_of
from nm_permute_plugin.specs.spec import Consumer, ResolvedSpec, Space

ONLY = " of only "
"""In what a session knows a problem by, before the digest of what it was reduced to."""

Scores = Mapping[str, Float[Tensor, "_out _in"]]
"""Scores of the weights of linears, by linear."""


@dataclass(frozen=True)
class Solution:
    """
    What was found for a problem.

    :param perms: by space, ``new[j] = old[perm[j]]``; spaces without one stay as they are
    :param multipliers: of the scores, by linear, for every input channel as it was
        before the fold; one row for each group of rows of the weight. Without any they
        are 1
    """

    perms: dict[str, Permutation] = field(default_factory=dict)
    multipliers: dict[str, Float[Tensor, "_row_groups _in"]] = field(
        default_factory=dict
    )

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The arguments that make it."""
        return {"perms": self.perms, "multipliers": self.multipliers}


@dataclass(frozen=True)
class SpaceScores:
    """
    The scores of every weight that consumes a space: one column a channel, the
    consumers one below the other.

    :param rows: how many rows each consumer has, in the order of ``space.consumers``
    :param sensitivity: the weight of each row in the search's objective; None weighs all
        alike. Masks are made row by row and do not depend on it
    """

    space: Space
    score: Float[Tensor, "rows channels"]
    rows: tuple[int, ...]
    sensitivity: Float[Tensor, " rows"] | None = None

    @classmethod
    def of(
        cls,
        space: Space,
        scores: Scores,
        sensitivity: Mapping[str, Float[Tensor, " _out"]] | None = None,
    ) -> "SpaceScores":
        """
        Stack the scores of a space's consumers.

        :param scores: by linear; every consumer of the space has one
        :param sensitivity: of the outputs of every linear
        """
        views = [consumer.view(scores[consumer.name]) for consumer in space.consumers]
        of_rows = None
        if sensitivity is not None:
            parts = [sensitivity[c.name].repeat(c.queries) for c in space.consumers]
            of_rows = torch.cat(parts)
        rows = tuple(len(view) for view in views)
        return cls(space, torch.cat(views), rows, of_rows)

    @property
    def queries(self) -> tuple[int, ...]:
        """How often each consumer reads a channel of the space."""
        return tuple(consumer.queries for consumer in self.space.consumers)

    def parts(self) -> list[tuple[Consumer, Float[Tensor, "_rows channels"]]]:
        """Every consumer with its scores, as it views them; no copies."""
        pieces = self.score.split(list(self.rows))
        return list(zip(self.space.consumers, pieces, strict=True))

    def masks(
        self, perm: Permutation, pattern: NMPattern, solution: Solution
    ) -> dict[str, Bool[Tensor, "_out _in"]]:
        """
        The N:M masks of all consumers under a permutation, channels in their old
        places.
        """
        return {
            consumer.name: consumer.unview(
                permuted_mask(
                    consumer,
                    score,
                    perm,
                    pattern,
                    solution.multipliers.get(consumer.name),
                )
            )
            for consumer, score in self.parts()
        }

    def only(self, names: Collection[str]) -> "SpaceScores | None":
        """Those consumers alone; None if the space has none of them."""
        kept = [consumer.name in names for consumer in self.space.consumers]
        if all(kept):
            return self
        if not any(kept):
            return None
        sizes = list(self.rows)
        of_rows = self.sensitivity
        if of_rows is not None:
            of_rows = torch.cat(list(compress(of_rows.split(sizes), kept)))
        return SpaceScores(
            replace(self.space, consumers=tuple(compress(self.space.consumers, kept))),
            torch.cat(list(compress(self.score.split(sizes), kept))),
            tuple(compress(sizes, kept)),
            of_rows,
        )


@dataclass(frozen=True)
class Problem:
    """
    A dense model that is to be pruned, with what is known of it.

    :param spaces: the scores of all consumers, by the name of the space that may be
        permuted
    :param fixed: scores of the pruned linears whose inputs keep their places
    :param teacher: the dense model as the one to be followed
    :param known: by which a session knows the model and the data
    """

    model: nn.Module
    spaces: Mapping[str, SpaceScores]
    fixed: Scores
    data: Data
    pattern: NMPattern
    teacher: Teacher
    known: str = ""

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        resolved: ResolvedSpec,
        prunable: Sequence[str],
        data: Data,
        settings: Settings,
    ) -> "Problem":
        """
        Measure a dense model: the statistics of its activations and the scores of its
        weights.

        :param prunable: names of the linears to prune
        :raises ValueError: for bad statistics, and for outputs that are not finite
        """
        known = known_run(model, prunable, data, settings)
        norms = measured_norms(model, prunable, data, settings, known)
        device = next(model.parameters()).device
        scores: dict[str, Tensor] = {
            name: score_weight(
                settings.score, weight_of(linear(model, name)), norms.get(name)
            ).to("cpu" if settings.layer_wise else device)
            for name in prunable
        }
        steps = settings.training_steps
        keep_training = pays_to_keep(model, steps, len(data.train))
        teacher = Teacher(model, settings.loss, keep_training=keep_training)
        spaces: dict[str, SpaceScores] = {}
        if settings.method != "identity":
            sensitivity = None
            # One layer at a time, nothing is known of what follows it.
            if not settings.layer_wise:
                sensitivity = measured_sensitivity(
                    model, prunable, data, settings, known
                )
            for name, space in resolved.spaces.items():
                if space.consumers and space.family in settings.spaces:
                    spaces[name] = SpaceScores.of(space, scores, sensitivity)
                    # Two copies of all scores would not fit beside a large model.
                    for consumer in space.consumers:
                        del scores[consumer.name]
        return cls(model, spaces, scores, data, settings.pattern, teacher, known)

    @property
    def linears(self) -> list[str]:
        """The names of the pruned linears."""
        consumers = [c.name for of in self.spaces.values() for c in of.space.consumers]
        return [*self.fixed, *consumers]

    def only(self, names: Collection[str]) -> "Problem":
        """
        Those linears alone: all others are left as they are, and nothing is found for them.

        Spaces that none of them consumes are left out.
        """
        left_out = sorted(set(self.linears).difference(names))
        if not left_out:
            return self
        parts = {name: of.only(names) for name, of in self.spaces.items()}
        kept = sorted(set(self.linears).intersection(names))
        digest = blake2b(repr(kept).encode(), digest_size=16).hexdigest()
        whole, _, _ = self.known.partition(ONLY)
        return replace(
            self,
            spaces={name: of for name, of in parts.items() if of is not None},
            fixed={name: score for name, score in self.fixed.items() if name in names},
            known=f"{whole}{ONLY}{digest}",
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of masks that need gradients."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the model runs; scores and masks may be elsewhere."""
        return next(self.model.parameters()).device

    @cached_property
    def fixed_masks(self) -> dict[str, Bool[Tensor, "_out _in"]]:
        """The masks of the linears whose inputs keep their places."""
        return {
            name: nm_mask(score.to(self.device), self.pattern).to(score.device)
            for name, score in self.fixed.items()
        }

    def complete(self, solution: Solution) -> Solution:
        """The solution with a permutation for every space, the identity if it had none."""
        missing = {
            name: torch.arange(of.space.size, device=self.device)
            for name, of in self.spaces.items()
            if name not in solution.perms
        }
        if not missing:
            return solution
        return Solution(solution.perms | missing, solution.multipliers)

    def agreed(self, solution: Solution) -> Solution:
        """The solution of the first rank: of others whose devices round differently."""
        if ranks.count() == 1:
            return solution
        return Solution(**ranks.of_first(solution.state_dict))

    def masks(self, solution: Solution) -> dict[str, Tensor]:
        """The masks of all linears under a solution, channels in their old places."""
        solution = self.complete(solution)
        masks = dict(self.fixed_masks)
        for name, of in self.spaces.items():
            masks |= of.masks(solution.perms[name], self.pattern, solution)
        return masks

    def validate(self, solution: Solution) -> float:
        """The loss on the validation data under a solution."""
        masks = self.masks(solution)
        return self.teacher.validate(masks, self.data.validation)


def measured_norms(
    model: nn.Module,
    prunable: Sequence[str],
    data: Data,
    settings: Settings,
    known: str,
) -> dict[str, Tensor]:
    """The norms of all linears' inputs, or none where the score does not ask for them."""
    if settings.score == "magnitude":
        return {}
    return once(lambda: input_norms(model, prunable, data.train), "input norms", known)


def measured_sensitivity(
    model: nn.Module,
    prunable: Sequence[str],
    data: Data,
    settings: Settings,
    known: str,
) -> dict[str, Tensor]:
    """What an error of each output of the linears costs."""
    seed = settings.seed
    return once(
        lambda: output_sensitivity(model, prunable, data.train, seed),
        "output sensitivity",
        *(known, seed),
    )


def permuted_mask(
    consumer: Consumer,
    score: Float[Tensor, "rows channels"],
    perm: Permutation,
    pattern: NMPattern,
    multipliers: Float[Tensor, "row_groups in"] | None = None,
) -> Bool[Tensor, "rows channels"]:
    """
    The N:M mask of one consumer under a permutation, channels in their old places.

    It is made where the permutation is, and kept where the score is.

    :param score: as the consumer views its weight
    :param multipliers: of the scores, as in ``Solution``; 1 without any
    """
    stored, score = score.device, score.to(perm.device)
    if multipliers is not None:
        factors = consumer.view(multipliers)
        groups = score.unflatten(0, (len(factors), -1))
        score = (groups * factors[:, None]).flatten(0, 1)
    mask = nm_mask(score[:, perm], pattern)[:, invert(perm)]
    return mask.to(stored)
