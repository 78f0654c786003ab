# SPDX-License-Identifier: Apache-2.0
"""What a diagnosis looks at: a model, its scores by space, a start, and text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from transformers import AutoModelForCausalLM

from loop import learning_steps
from methods import prunable
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, invert
from nm_permute_plugin.maths.scores import score_weight
from nm_permute_plugin.maths.sinkhorn import annealed
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.orientation import weight_of
from nm_permute_plugin.specs.spec import resolve
from nm_permute_plugin.training.learn import LearnSettings
from nm_permute_plugin.training.masking import Mask, linear
from nm_permute_plugin.training.objective import LossWeights
from nm_permute_plugin.training.orders import LearnableOrders
from nm_permute_plugin.training.samples import Samples
from nm_permute_plugin.training.search import search_orders
from nm_permute_plugin.training.stacking import StackedScore
from nm_permute_plugin.training.statistics import Batch, input_norms
from nm_permute_plugin.training.subject import Learned, Subject, mean_loss

Perms = dict[str, Permutation]


@dataclass(frozen=True)
class Started(Subject):
    """
    A subject, and where the learning of its order starts.

    :param start: by space
    """

    start: Perms

    def orders(self, settings: LearnSettings) -> LearnableOrders:
        """Parameters of the orders, at the start."""
        return LearnableOrders(
            self.stacks, self.start, self.pattern, settings.shape, self.dtype
        )

    def loss(
        self, orders: LearnableOrders, batches: list[Batch], weights: LossWeights
    ) -> float:
        """The loss under the orders as they stand, hard, multipliers included."""
        masks = self.masks(Learned(orders.perms(), orders.multipliers()))
        return mean_loss(self.model, masks, batches, weights)


def load(
    folder: Path,
    text: Samples,
    pattern: NMPattern,
    rounds: int,
    seed: int,
    device: str,
    dtype: torch.dtype,
) -> Started:
    """
    Measure a model and search its start.

    :param rounds: of the search; 0 starts in the order as it is
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(device).eval()
    linears = prunable(model)
    resolved = resolve(
        model, spec_of(model), pattern, linears, head_dim_of(model.config)
    )
    norms = input_norms(model, linears, text.train)
    scores = {
        name: score_weight("wanda", weight_of(linear(model, name)), norms[name])
        for name in linears
    }
    stacks = {
        name: StackedScore.of(space, scores)
        for name, space in resolved.spaces.items()
        if space.readers
    }
    others = {name: nm_mask(scores[name], pattern) for name in resolved.unordered}
    subject = Subject(model, stacks, others, text, pattern)

    def judge(perms: dict[str, Permutation]) -> float:
        return subject.held_back_loss(Learned(perms), LearnSettings().loss)

    start = search_orders(stacks, pattern, rounds, seed, judge).perms
    return Started(model, stacks, others, text, pattern, start)


def learning(
    subject: Started, settings: LearnSettings, warm_up: int = 0
) -> Iterator[tuple[int, float, LearnableOrders]]:
    """
    Learn, with a look before the first step and after every ``evaluate_every``.

    :param warm_up: steps over which the learning rates rise first
    :return: the step, the temperature of its masks, and the orders, which go on changing
    """
    orders = subject.orders(settings)
    optimizer = torch.optim.AdamW(
        [
            {"params": orders.parameters(), "weight_decay": settings.weight_decay},
            {"params": orders.log_multipliers(), "lr": settings.multiplier_rate},
        ],
        lr=settings.learning_rate,
        weight_decay=0.0,
    )

    def temperature(step: int) -> float:
        return annealed(max(step - 1, 0), settings.steps, *settings.temperature)

    def masks_at(step: int) -> dict[str, Mask]:
        return {**subject.others, **orders.at(temperature(step), step).masks()}

    yield 0, temperature(0), orders
    train = subject.samples.train
    for step, _ in learning_steps(
        subject.model, masks_at, optimizer, train, settings, warm_up
    ):
        orders.assign()
        if step % settings.evaluate_every == 0 or step == settings.steps:
            yield step, temperature(step), orders


def parted(before: Perms, after: Perms, m: int) -> float:
    """
    The share of pairs that had a group of ``m`` in common and have none any more.

    >>> order = torch.arange(4)
    >>> parted({"residual": order}, {"residual": order[[0, 2, 1, 3]]}, 2)
    1.0
    """
    left = pairs = 0
    for name, old in before.items():
        group = invert(after[name]) // m
        mates = rearrange(group[old], "(g m) -> g m", m=m)
        first, second = torch.triu_indices(m, m, offset=1).to(mates.device)
        left += int((mates[:, first] != mates[:, second]).sum())
        pairs += mates.shape[0] * len(first)
    return left / pairs
