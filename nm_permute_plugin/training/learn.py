# SPDX-License-Identifier: Apache-2.0
"""Learn the order end to end: frozen weights, one matrix of logits per block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.maths.sinkhorn import annealed
from nm_permute_plugin.training.masking import Mask, masked
from nm_permute_plugin.training.objective import LossWeights, loss, run
from nm_permute_plugin.training.orders import LearnableOrders, OrderShape
from nm_permute_plugin.training.stacking import StackedScore
from nm_permute_plugin.training.statistics import Batch, on_device
from nm_permute_plugin.training.step import (
    backward_step,
    check_finite,
    layers_to_checkpoint,
)
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


@dataclass
class Learned:
    """
    What learning leaves.

    :param perms: by space, the best orders by the held-back text
    :param multipliers: of the scores, by linear, one an input channel as it was before
        the fold; those that belong to ``perms``
    :param history: one entry a look: step, held-back loss and, from the first step on,
        training loss and temperature
    """

    perms: dict[str, Permutation]
    multipliers: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, int | float]] = field(default_factory=list)


def learn_orders(
    model: nn.Module,
    stacks: Mapping[str, StackedScore],
    start: Mapping[str, Permutation],
    other_masks: Mapping[str, Tensor],
    train: Sequence[Batch],
    held_back: Sequence[Batch],
    pattern: NMPattern,
    settings: LearnSettings,
) -> Learned:
    """
    Learn one order a space, so that the pruned model stays close to the dense one.

    The start is looked at first, so what comes back is never worse than the start on the
    held-back text. Weights are frozen. The same seed gives the same orders.

    :param stacks: by space
    :param start: by space
    :param other_masks: of pruned linears whose inputs no learned space orders, by module
    :param train: batches, used in random order, again and again
    :param held_back: batches that decide which order is kept; never trained on
    :raises ValueError: if a loss is not finite, or there is nothing to train on
    """
    if not train or not held_back:
        raise ValueError(
            f"learning needs text to train on and text held back, got {len(train)} and "
            f"{len(held_back)} batches; give the run more calibration samples"
        )
    dtype = next(model.parameters()).dtype
    orders = LearnableOrders(stacks, start, pattern, settings.shape, dtype)
    batches = _shuffled(train, settings.seed)
    teacher = Teacher(model, settings.loss)

    def masks(tau: float, step: int) -> dict[str, Mask]:
        return {**other_masks, **orders.masks(tau, step)}

    def look(now: Learned) -> float:
        hard = hard_masks(stacks, now.perms, other_masks, pattern, now.multipliers)
        return mean_loss(model, hard, held_back, settings.loss, teacher)

    with frozen(model), torch.enable_grad():
        layers = layers_to_checkpoint(
            model,
            [*other_masks, *(r.name for s in stacks.values() for r in s.space.readers)],
            partial(masks, 1.0, 0),
            train[0],
            settings.loss,
            settings.micro_batch_size,
            settings.gradient_checkpointing,
        )

        def step(tau: float, number: int) -> float:
            return backward_step(
                model,
                partial(masks, tau, number),
                next(batches),
                settings.loss,
                settings.micro_batch_size,
                layers,
                teacher,
            )

        learned = descend(orders, step, look, settings)
    looks = [look["held_back"] for look in learned.history]
    logger.info(
        f"learned {len(stacks)} orders in {settings.steps} steps: held-back loss "
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
        optimizer.zero_grad()
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


def hard_masks(
    stacks: Mapping[str, StackedScore],
    perms: Mapping[str, Permutation],
    other_masks: Mapping[str, Tensor],
    pattern: NMPattern,
    multipliers: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """
    The masks of all linears under the orders, in the channels' old places.

    :param multipliers: of the scores, by linear, one an input channel; 1 by default
    """
    masks = dict(other_masks)
    for name, stack in stacks.items():
        masks |= stack.masks(perms[name], pattern, multipliers)
    return masks


def mean_loss(
    model: nn.Module,
    masks: Mapping[str, Mask],
    batches: Sequence[Batch],
    weights: LossWeights,
    teacher: Teacher | None = None,
) -> float:
    """
    The loss of the model under the masks, the mean over the batches.

    :param teacher: the dense model, which runs for every batch by default
    :raises ValueError: if it is not finite
    """
    total = 0.0
    teacher = teacher or Teacher(model, weights, keep=False)
    with torch.no_grad():
        for batch in batches:
            dense = teacher(batch)
            batch = on_device(batch, model)
            with masked(model, masks):
                total += float(loss(run(model, batch, weights), dense, batch, weights))
    return check_finite(total, "held-back") / len(batches)


def _shuffled(batches: Sequence[Batch], seed: int) -> Iterator[Batch]:
    """Every batch once an epoch, in a new order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


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
