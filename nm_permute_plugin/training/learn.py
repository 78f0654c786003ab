# SPDX-License-Identifier: Apache-2.0
"""Learn the order end to end: frozen weights, one matrix of logits per block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from loguru import logger
from torch import nn
from tqdm import tqdm

from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.maths.sinkhorn import annealed
from nm_permute_plugin.training.kept import endless
from nm_permute_plugin.training.masking import Mask
from nm_permute_plugin.training.objective import LossWeights
from nm_permute_plugin.training.orders import LearnableOrders, OrderShape
from nm_permute_plugin.training.step import BackwardStep, layers_to_checkpoint
from nm_permute_plugin.training.subject import Learned, Subject
from nm_permute_plugin.training.teacher import Teacher


@dataclass(frozen=True)
class LearnSettings:
    """
    How orders are learned.

    :param steps: optimiser steps
    :param learning_rate: of AdamW, on the logits; falls linearly to 0
    :param weight_decay: of AdamW, on the logits
    :param multiplier_rate: the learning rate of the multipliers of the scores
    :param temperature: of the matching, at the first and at the last step
    :param shape: how an order is parametrised
    :param loss: weights of the loss
    :param evaluate_every: steps between two looks at the held-back text
    :param seed: of the order of the batches
    :param micro_batch_size: rows that go through the model at a time; None: a whole batch
    :param gradient_checkpointing: keep only what enters a layer, and run it again in
        backward; None: where a GPU's memory asks for it
    """

    steps: int = 200
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    multiplier_rate: float = 0.03
    temperature: tuple[float, float] = (1.0, 0.1)
    shape: OrderShape = field(default_factory=OrderShape)
    loss: LossWeights = field(default_factory=LossWeights)
    evaluate_every: int = 20
    seed: int = 0
    micro_batch_size: int | None = None
    gradient_checkpointing: bool | None = None


def learn_orders(
    subject: Subject, start: Mapping[str, Permutation], settings: LearnSettings
) -> Learned:
    """
    Learn one order a space, so that the pruned model stays close to the dense one.

    The start is looked at first, so what comes back is never worse than the start on the
    held-back samples. Weights are frozen. The same seed gives the same orders.

    :param start: by space
    :raises ValueError: if a loss is not finite, or there is nothing to train on
    """
    model, samples = subject.model, subject.samples
    if not samples.train or not samples.held_back:
        raise ValueError(
            "learning needs text to train on and text held back, got "
            f"{len(samples.train)} and {len(samples.held_back)} batches; give the run "
            "more calibration samples"
        )
    orders = LearnableOrders(
        subject.stacks, start, subject.pattern, settings.shape, subject.dtype
    )
    numbers = endless(len(samples.train), settings.seed)
    teacher = Teacher(model, settings.loss)

    def masks() -> dict[str, Mask]:
        return {**subject.others, **orders.masks()}

    def look(now: Learned) -> float:
        return subject.held_back_loss(now, settings.loss, teacher)

    with frozen(model), torch.enable_grad():
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

        def step(tau: float, number: int) -> float:
            batch = samples.train[next(numbers)]
            return backward(batch, partial(orders.at, tau, number))

        learned = descend(orders, step, look, settings)
    looks = [look["held_back"] for look in learned.history]
    logger.info(
        f"learned {len(subject.stacks)} orders in {settings.steps} steps: held-back loss "
        f"{looks[0]:.4f} -> {min(looks):.4f}"
    )
    return learned


def descend(
    orders: LearnableOrders,
    step: Callable[[float, int], float],
    look: Callable[[Learned], float],
    settings: LearnSettings,
    what: str = "Learning the order",
) -> Learned:
    """
    Optimise orders, and keep the best by the looks; the first is at the start.

    :param step: leaves the gradients of a step, given its temperature and its number;
        returns the loss
    :param look: the loss on the held-back text
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": orders.parameters(), "weight_decay": settings.weight_decay},
            {"params": orders.log_multipliers(), "lr": settings.multiplier_rate},
        ],
        lr=settings.learning_rate,
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 1 / settings.steps, total_iters=settings.steps
    )
    learned = Learned(orders.perms(), orders.multipliers())
    best = look(learned)
    history: list[dict[str, int | float]] = [{"step": 0, "held_back": best}]
    bar = tqdm(range(1, settings.steps + 1), desc=what)
    for number in bar:
        tau = annealed(number - 1, settings.steps, *settings.temperature)
        value = step(tau, number)
        optimizer.step()
        orders.assign()
        optimizer.zero_grad(set_to_none=False)
        schedule.step()
        bar.set_postfix(loss=f"{value:.4f}", best=f"{best:.4f}", tau=f"{tau:.3f}")
        if number % settings.evaluate_every and number != settings.steps:
            continue
        now = Learned(orders.perms(), orders.multipliers())
        held = look(now)
        history.append(
            {"step": number, "held_back": held, "loss": value, "temperature": tau}
        )
        if held < best:
            best, learned = held, now
    learned.history = history
    return learned


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
