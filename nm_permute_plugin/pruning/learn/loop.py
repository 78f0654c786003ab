# SPDX-License-Identifier: Apache-2.0
"""Learn the orders end to end, then the multipliers of the scores; weights are frozen."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from loguru import logger
from torch import nn
from tqdm import tqdm

from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.maths.sinkhorn import annealed
from nm_permute_plugin.pruning.learn.order_shape import Learns, OrderShape
from nm_permute_plugin.pruning.learn.orders import LearnableOrders
from nm_permute_plugin.pruning.problem import Learned, Subject
from nm_permute_plugin.pruning.recover.student import endless
from nm_permute_plugin.pruning.running.backward import (
    BackwardStep,
    layers_to_checkpoint,
)
from nm_permute_plugin.pruning.running.loss import LossWeights
from nm_permute_plugin.pruning.running.masked import Mask
from nm_permute_plugin.pruning.running.teacher import Teacher


@dataclass(frozen=True)
class LearnSettings:
    """
    How orders are learned.

    Where multipliers of the scores are learned, orders come first, if they are given any
    steps, then they stay.

    :param steps: optimiser steps
    :param order_share: of the steps, in which the orders learn; all without multipliers
    :param swaps: of ``insertion``: the share of blocks of channels in which two change
        places at the first step; falls linearly to 0
    :param learning_rate: of AdamW, on the logits of ``straight_through`` and ``soft``;
        falls linearly to 0
    :param weight_decay: of AdamW, on the logits
    :param multiplier_rate: of AdamW, on the logarithms of the multipliers; falls likewise
    :param temperature: of the matching, at the first and at the last step
    :param shape: how an order is parametrised
    :param loss: weights of the loss
    :param evaluate_every: steps between two looks at the validation text
    :param seed: of the order of the batches
    :param micro_batch_size: rows that go through the model at a time; None: a whole batch
    :param gradient_checkpointing: keep only what enters a layer, and run it again in
        backward; None: where a GPU's memory asks for it
    """

    steps: int = 200
    order_share: float = 0.0
    swaps: float = 1.0
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    multiplier_rate: float = 0.01
    temperature: tuple[float, float] = (1.0, 0.1)
    shape: OrderShape = field(default_factory=OrderShape)
    loss: LossWeights = field(default_factory=LossWeights)
    evaluate_every: int = 20
    seed: int = 0
    micro_batch_size: int | None = None
    gradient_checkpointing: bool | None = None

    def phases(self, learners: Collection[Learns]) -> dict[Learns, int]:
        """The steps in which each of the learners learns, one after the other."""
        if len(learners) < 2:
            return dict.fromkeys(learners, self.steps)
        first = round(self.order_share * self.steps)
        every: dict[Learns, int] = {"order": first, "multipliers": self.steps - first}
        return {what: steps for what, steps in every.items() if steps}


Step = Callable[[float, int], float]
"""Leaves the gradients of a step, given its temperature and its number; gives the loss."""


def learn_orders(
    subject: Subject,
    start: Mapping[str, Permutation],
    settings: LearnSettings,
    watch: Callable[[int, LearnableOrders], object] = lambda step, orders: None,
) -> Learned:
    """
    Learn orders of spaces, and multipliers of their scores, so that the pruned model stays
    close to the dense one.

    The start is looked at first, so what comes back is never worse than the start on the
    validation samples. Weights are frozen. The same seed gives the same orders.

    :param start: by space
    :param watch: is shown the orders as they stand before every look at the validation
        text; must leave them so
    :raises ValueError: if a loss is not finite, or there is nothing to train on
    """
    model, samples = subject.model, subject.samples
    if not samples.train or not samples.validation:
        raise ValueError(
            "learning needs text to train on and text held back, got "
            f"{len(samples.train)} and {len(samples.validation)} batches; give the run "
            "more calibration samples"
        )
    orders = LearnableOrders(
        subject.stacks, start, subject.pattern, settings.shape, subject.dtype
    )
    numbers = endless(len(samples.train), settings.seed)
    teacher = Teacher(model, settings.loss)

    def masks() -> dict[str, Mask]:
        return {**subject.others, **orders.masks()}

    def look(now: Learned, step: int) -> float:
        watch(step, orders)
        return subject.validation_loss(now, settings.loss, teacher)

    def begin() -> Step:
        orders.at(settings.temperature[0], 0)
        layers = layers_to_checkpoint(
            model,
            subject.linears,
            masks,
            samples.train[0],
            settings.loss,
            settings.micro_batch_size,
            settings.gradient_checkpointing,
        )
        backward = BackwardStep(
            model,
            masks,
            settings.loss,
            settings.micro_batch_size,
            layers,
            teacher,
            replay=not orders.steps_differ,
        )
        return lambda tau, number: backward(
            samples.train[next(numbers)], partial(orders.at, tau, number)
        )

    with frozen(model), torch.enable_grad():
        learned = descend(orders, begin, look, settings)
    looks = [look["validation"] for look in learned.history]
    logger.info(
        f"learned in {settings.steps} steps, {len(subject.stacks)} spaces: validation loss "
        f"{looks[0]:.4f} -> {min(looks):.4f}"
    )
    return learned


def descend(
    orders: LearnableOrders,
    begin: Callable[[], Step],
    look: Callable[[Learned, int], float],
    settings: LearnSettings,
    desc: str = "Learning the order",
) -> Learned:
    """
    Learn orders, then multipliers, and keep the best by the looks.

    The first look is at the start. Multipliers are learned for the best of the orders.

    :param begin: called when others begin to learn; gives the step
    :param look: the loss on the validation text, after a step
    """
    best = _Best(orders, look)
    phases = settings.phases(orders.learners)
    last = 0
    with tqdm(total=sum(phases.values()), desc=desc) as bar:
        for what, steps in phases.items():
            best.restore()
            orders.learn(what)
            first, last = last + 1, last + steps
            _run(range(first, last + 1), best, begin(), what, settings, bar)
    return best.learned


class _Best:
    """
    The best of the orders and multipliers that were looked at.

    :ivar learned: it, with the looks
    """

    def __init__(
        self, orders: LearnableOrders, look: Callable[[Learned, int], float]
    ) -> None:
        self.orders, self._look = orders, look
        self.learned = Learned(orders.perms(), orders.multipliers())
        self.loss = look(self.learned, 0)
        self._groups = orders.groups()
        self._history: list[dict[str, int | float]] = []
        self._history.append({"step": 0, "validation": self.loss})
        self.learned.history = self._history

    def look(self, step: int, **figures: float) -> None:
        """Look at what there is after a step."""
        now = Learned(self.orders.perms(), self.orders.multipliers())
        held = self._look(now, step)
        self._history.append({"step": step, "validation": held, **figures})
        if held < self.loss:
            self.loss, self.learned = held, now
            self.learned.history = self._history
            self._groups = self.orders.groups()

    def restore(self) -> None:
        """Let the orders be the best again."""
        self.orders.regroup(self._groups)


def _run(
    numbers: range,
    best: _Best,
    step: Step,
    what: Learns,
    settings: LearnSettings,
    bar: "tqdm[Any]",
) -> None:
    """The steps in which the same learn, and their looks."""
    update = _updates(best.orders, what, len(numbers), settings)
    for number in numbers:
        tau = annealed(number - 1, settings.steps, *settings.temperature)
        value = step(tau, number)
        update()
        if number % settings.evaluate_every == 0 or number == numbers[-1]:
            best.look(number, loss=value, temperature=tau)
        bar.set_postfix(loss=f"{value:.4f}", best=f"{best.loss:.4f}")
        bar.update()


def _updates(
    orders: LearnableOrders, what: Learns, steps: int, settings: LearnSettings
) -> Callable[[], None]:
    """What follows each of so many backward passes; gradients are cleared in place."""
    if what == "order" and settings.shape.relaxation == "insertion":
        shares = (settings.swaps * (1 - done / steps) for done in range(steps))
        return lambda: orders.swap(next(shares))
    if what == "order":
        optimizer = torch.optim.AdamW(
            orders.logits(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
    else:
        optimizer = torch.optim.AdamW(
            orders.log_multipliers(), lr=settings.multiplier_rate, weight_decay=0.0
        )
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 1 / steps, total_iters=steps
    )

    def update() -> None:
        optimizer.step()
        orders.assign()
        optimizer.zero_grad(set_to_none=False)
        schedule.step()

    return update


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the weights while the context lasts."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
