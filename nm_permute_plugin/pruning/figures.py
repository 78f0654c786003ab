# SPDX-License-Identifier: Apache-2.0
"""What the masks of a run keep and change, linear by linear, and a corner of one mask."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nm_permute_plugin.maths.permutation import Permutation, is_identity
from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.problem import Problem, Solution, permuted_mask
from nm_permute_plugin.specs.spec import Consumer

CROP = 32, 64
"""The rows and the channels of a mask that are kept to be shown."""


@dataclass(frozen=True)
class LinearFigures:
    """
    What the masks of one linear keep: the plain one, of the channels as they were and
    without multipliers, and the one that was found.

    :param weights: how many weights the linear has
    :param score: the sum of the scores of all its weights
    :param before: the share of it that the plain mask keeps
    :param after: the share that the mask that was found keeps
    :param exchanged: the share of the weights kept that the plain mask drops
    :param cost_before: the score that the plain mask loses, each row's times what an error
        of that output costs (``statistics.output_sensitivity``); None where that was not
        measured
    :param cost_after: the same of the mask that was found
    """

    name: str
    weights: int
    score: float
    before: float
    after: float
    exchanged: float
    cost_before: float | None = None
    cost_after: float | None = None


@dataclass(frozen=True)
class Crop:
    """
    The first rows and channels of one linear's masks, a string of 0 and 1 a row.

    Rows are in their old order; where heads share channels, they are those of the
    first query head.

    :param name: of the linear
    :param space: that orders its inputs
    :param channels: the old places of the channels that stand first now
    :param before: the plain mask, channels in their old order
    :param after: the mask that was found, channels in their new order
    :param was: what the plain mask says of the weights of ``after``
    """

    name: str
    space: str
    channels: list[int]
    before: list[str]
    after: list[str]
    was: list[str]


@dataclass(frozen=True)
class Figures:
    """
    What the masks of a run keep and change.

    :param crop: of the linear whose mask changed most; None where no space is permuted
    """

    linears: list[LinearFigures]
    crop: Crop | None = None

    @property
    def retained(self) -> tuple[float, float]:
        """The share of the total score that the plain masks keep, and those found."""
        total = sum(linear.score for linear in self.linears)
        before = sum(linear.before * linear.score for linear in self.linears)
        after = sum(linear.after * linear.score for linear in self.linears)
        return (before / total, after / total) if total else (1.0, 1.0)


@dataclass(frozen=True)
class _Row:
    """One linear: its scores as its consumer views them, and where its inputs move."""

    consumer: Consumer
    score: Float[Tensor, "rows channels"]
    space: str | None = None
    perm: Permutation | None = None
    sensitivity: Float[Tensor, " rows"] | None = None


def figures_of(
    problem: Problem,
    found: Solution,
    masks: Mapping[str, Bool[Tensor, "_out _in"]],
    order: Sequence[str],
) -> Figures:
    """
    Compare the masks that were found with the plain ones, one linear at a time.

    :param masks: of ``found``, by linear, channels in their old places
    :param order: the linears that have masks, as they are to be listed
    """
    there = [row for row in _rows(problem, found) if row.consumer.name in masks]
    compared = [
        _compared(problem, row, masks)
        for row in ranks.bar(there, "Comparing the masks")
    ]
    by_name = {linear.name: linear for linear in compared}
    linears = [by_name[name] for name in order]
    exchanged = {linear.name: linear.exchanged for linear in linears}
    moved = [row for row in there if row.perm is not None]
    real = [row for row in moved if row.perm is not None and not is_identity(row.perm)]
    most = max(real or moved, key=lambda r: exchanged[r.consumer.name], default=None)
    return Figures(linears, None if most is None else _crop(problem, most, masks))


def _rows(problem: Problem, found: Solution) -> Iterator[_Row]:
    for name, score in problem.fixed.items():
        yield _Row(Consumer(name), score)
    perms = problem.complete(found).perms
    for name, of in problem.spaces.items():
        parts = of.parts()
        weighed: list[Tensor | None] = [None] * len(parts)
        if of.sensitivity is not None:
            weighed = list(of.sensitivity.split(list(of.rows)))
        for (consumer, score), sensitivity in zip(parts, weighed, strict=True):
            yield _Row(consumer, score, name, perms[name], sensitivity)


def _plain(problem: Problem, row: _Row) -> Bool[Tensor, "rows channels"]:
    """The mask of a linear without a permutation and without multipliers."""
    if row.space is None:
        return problem.fixed_masks[row.consumer.name]
    as_it_is = torch.arange(row.score.shape[1], device=problem.device)
    return permuted_mask(row.consumer, row.score, as_it_is, problem.pattern)


def _compared(
    problem: Problem, row: _Row, masks: Mapping[str, Bool[Tensor, "_out _in"]]
) -> LinearFigures:
    """The figures of one linear, counted where the model runs."""
    name, device = row.consumer.name, problem.device
    score = row.score.to(device)
    plain = _plain(problem, row).to(device)
    mask = row.consumer.view(masks[name]).to(device)
    total = float(score.double().sum())
    before, after = (score.masked_fill(~of, 0).sum(1).double() for of in (plain, mask))
    costs: list[float | None] = [None, None]
    if row.sensitivity is not None:
        weight = row.sensitivity.to(device).double()
        whole = score.sum(1).double()
        costs = [float((whole - kept) @ weight) for kept in (before, after)]
    return LinearFigures(
        name,
        score.numel(),
        total,
        float(before.sum()) / total if total else 1.0,
        float(after.sum()) / total if total else 1.0,
        float((mask & ~plain).sum()) / float(mask.sum().clamp_min(1)),
        *costs,
    )


def _crop(
    problem: Problem, row: _Row, masks: Mapping[str, Bool[Tensor, "_out _in"]]
) -> Crop:
    rows, count = CROP
    perm = row.perm if row.perm is not None else torch.arange(count)
    channels = perm[:count].cpu()
    plain = _plain(problem, row)[:rows].cpu()
    found = row.consumer.view(masks[row.consumer.name])[:rows].cpu()
    return Crop(
        row.consumer.name,
        row.space or "",
        channels.tolist(),
        _bits(plain[:, :count]),
        _bits(found[:, channels]),
        _bits(plain[:, channels]),
    )


def _bits(mask: Bool[Tensor, "rows channels"]) -> list[str]:
    return ["".join("01"[bit] for bit in line) for line in mask.tolist()]
