# SPDX-License-Identifier: Apache-2.0
"""Masks that no fold can give: an order for every linear alone, or no order at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loop import learning_steps
from nm_permute_plugin.maths.mask_gradients import rivalry
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.pruning.energy import row_weights
from nm_permute_plugin.pruning.learn.loop import LearnSettings, learn_orders
from nm_permute_plugin.pruning.problem import Learned, Subject, mean_loss
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.search import search_orders
from nm_permute_plugin.pruning.stacking import StackedScore
from nm_permute_plugin.specs.spec import Consumer, Space

Masks = dict[str, Tensor]
Look = dict[str, int | float]


@dataclass(frozen=True)
class Unfolded:
    """
    Masks in the channels' own places, N:M only under the orders that made them.

    :param masks: by linear, True where a weight is kept
    :param perms: by space, one a linear; none where no order was asked for
    """

    masks: Masks
    perms: dict[str, Permutation]
    history: list[Look]


def own_spaces(
    scores: Mapping[str, Float[Tensor, "_out _in"]],
    weights: Mapping[str, Float[Tensor, " _out"]] | None = None,
) -> dict[str, StackedScore]:
    """
    A space for every linear alone, with its scores: its channels may go anywhere.

    :param weights: what the rows count in a search
    """
    spaces = [
        Space(f"input.{name}", score.shape[1], score.shape[1], (Consumer(name),))
        for name, score in scores.items()
    ]
    return {space.name: StackedScore.of(space, scores, weights) for space in spaces}


def order_alone(
    model: nn.Module,
    scores: Mapping[str, Float[Tensor, "_out _in"]],
    text: Samples,
    pattern: NMPattern,
    rounds: int,
    learn: LearnSettings,
    search_only: bool = False,
) -> Unfolded:
    """
    Order the inputs of every linear alone, and pull the masks back to the old places.

    That is how permutations are published: at run time each needs a gather.

    :param rounds: of the search that goes first; 0 starts in the order as it is
    """
    weights = row_weights(model, list(scores), text.train, learn.seed)
    stacks = own_spaces(scores, weights)
    subject = Subject(model, stacks, {}, text, pattern)

    def judge(perms: dict[str, Permutation]) -> float:
        return subject.validation_loss(Learned(perms), learn.loss)

    searched = search_orders(stacks, pattern, rounds, learn.seed, judge)
    found = Learned(searched.perms, history=searched.history)
    if not search_only:
        found = learn_orders(subject, searched.perms, learn)
    return Unfolded(subject.masks(found), found.perms, found.history)


class FreeMask(torch.autograd.Function):
    """
    The N:M mask of scores times multipliers, one a weight.

    Its gradient is that of the package's score multipliers (``rivalry``), not summed over
    any rows: what an order is not allowed to choose is chosen here weight by weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        score: Float[Tensor, "out in"],
        log_multiplier: Float[Tensor, "out in"],
        pattern: NMPattern,
        dtype: torch.dtype,
    ) -> Float[Tensor, "out in"]:
        scaled = score * log_multiplier.exp()
        ctx.save_for_backward(scaled)
        ctx.pattern = pattern
        return nm_mask(scaled, pattern).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scaled,) = ctx.saved_tensors
        column = torch.arange(scaled.shape[1], device=scaled.device) // ctx.pattern.m
        rival = rivalry(scaled[:, None], grads[0][:, None], column[None], ctx.pattern)
        return None, rival[:, 0], None, None


def learn_masks(
    model: nn.Module,
    scores: Mapping[str, Float[Tensor, "_out _in"]],
    text: Samples,
    pattern: NMPattern,
    settings: LearnSettings,
) -> Unfolded:
    """
    Learn which weights every group keeps, in the order as it is: a bound for all orders.

    Loss, text, number of steps and optimiser are those of the learned order; the rate is
    ``multiplier_rate``. The best masks by the validation text are kept, the start included.
    """
    dtype = next(model.parameters()).dtype
    logs = {name: torch.zeros_like(score) for name, score in scores.items()}
    for log in logs.values():
        log.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        logs.values(), lr=settings.multiplier_rate, weight_decay=0.0
    )

    def now() -> Masks:
        with torch.no_grad():
            return {
                name: nm_mask(score * logs[name].exp(), pattern)
                for name, score in scores.items()
            }

    def soft(step: int) -> Masks:
        return {
            name: FreeMask.apply(score, logs[name], pattern, dtype)
            for name, score in scores.items()
        }

    masks = now()
    best = mean_loss(model, masks, text.validation, settings.loss)
    history: list[Look] = [{"step": 0, "validation": best}]
    for step, value in learning_steps(model, soft, optimizer, text.train, settings):
        if step % settings.evaluate_every and step != settings.steps:
            continue
        here = now()
        held = mean_loss(model, here, text.validation, settings.loss)
        history.append({"step": step, "validation": held, "loss": value})
        if held < best:
            best, masks = held, here
    return Unfolded(masks, {}, history)
