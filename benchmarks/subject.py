# SPDX-License-Identifier: Apache-2.0
"""What a diagnosis looks at: a model, its scores by space, a start, and text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from methods import prunable
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.maths.scores import score_weight
from nm_permute_plugin.maths.sinkhorn import annealed
from nm_permute_plugin.pruning.learn.loop import LearnSettings, learn_orders
from nm_permute_plugin.pruning.learn.orders import LearnableOrders
from nm_permute_plugin.pruning.problem import Learned, Subject, mean_loss
from nm_permute_plugin.pruning.running.loss import LossWeights
from nm_permute_plugin.pruning.running.masked import linear
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.search import search_orders
from nm_permute_plugin.pruning.stacking import StackedScore
from nm_permute_plugin.pruning.statistics import Batch, input_norms
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.conv1d import weight_of
from nm_permute_plugin.specs.spec import resolve

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
        if space.consumers
    }
    others = {name: nm_mask(scores[name], pattern) for name in resolved.unordered}
    subject = Subject(model, stacks, others, text, pattern)

    def judge(perms: dict[str, Permutation]) -> float:
        return subject.validation_loss(Learned(perms), LearnSettings().loss)

    start = search_orders(stacks, pattern, rounds, seed, judge).perms
    return Started(model, stacks, others, text, pattern, start)


def learn(
    subject: Started,
    settings: LearnSettings,
    watch: Callable[[int, float, LearnableOrders], object],
) -> Learned:
    """
    Learn as the package does, from the subject's start.

    :param watch: is shown the step, the temperature of its masks and the orders as they
        stand, at every look
    """

    def seen(step: int, orders: LearnableOrders) -> None:
        temperature = annealed(max(step - 1, 0), settings.steps, *settings.temperature)
        watch(step, temperature, orders)

    return learn_orders(subject, subject.start, settings, seen)
