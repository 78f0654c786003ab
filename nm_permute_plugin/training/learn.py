# SPDX-License-Identifier: Apache-2.0
"""Learn the order end to end: frozen weights, one matrix of logits per block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from nm_permute_plugin.maths.assignment import assign, order_by
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, compose, from_blocks, invert
from nm_permute_plugin.maths.sinkhorn import annealed, sinkhorn
from nm_permute_plugin.training.masking import masked
from nm_permute_plugin.training.objective import LossWeights, loss, run
from nm_permute_plugin.training.relaxation import InsertionMask, permuted_mask
from nm_permute_plugin.training.stacking import StackedScore
from nm_permute_plugin.training.statistics import Batch, on_device

Relaxation = Literal["insertion", "straight_through", "soft"]


@dataclass(frozen=True)
class LearnSettings:
    """
    How an order is learned.

    :param steps: optimiser steps
    :param learning_rate: of AdamW, on the logits
    :param temperature: of the Sinkhorn matching, at the first and at the last step
    :param block_size: channels that may mix; a multiple of M
    :param groups: instead of ``block_size``: into how many blocks a space is cut
    :param relaxation: ``insertion``: hard groups, the gradient of every single move;
        ``straight_through``: hard places, the soft matching's gradient (PermLLM);
        ``soft``: soft places while training, hard at the end (arXiv 2601.22980)
    :param loss: weights of the loss
    :param sinkhorn_iterations: row and column normalisations
    :param start_logit: how firmly a channel starts in its place
    :param evaluate_every: steps between two looks at the held-back text
    :param seed: of the order of the batches
    """

    steps: int = 200
    learning_rate: float = 0.02
    temperature: tuple[float, float] = (1.0, 0.1)
    block_size: int = 64
    groups: int | None = None
    relaxation: Relaxation = "insertion"
    loss: LossWeights = LossWeights()
    sinkhorn_iterations: int = 10
    start_logit: float = 1.0
    evaluate_every: int = 20
    weight_decay: float = 0.0
    seed: int = 0


class LearnableOrder(nn.Module):
    """
    The order of one space while it is learned.

    :param stacked: the scores of all readers
    :param start: the order to begin with
    """

    def __init__(
        self,
        stacked: StackedScore,
        start: Permutation,
        pattern: NMPattern,
        settings: LearnSettings,
    ) -> None:
        super().__init__()
        self.stacked, self.pattern, self.settings = stacked, pattern, settings
        score = stacked.score
        wall = stacked.space.wall
        wanted = settings.block_size
        if settings.groups is not None:
            wanted = max(pattern.m, wall // settings.groups)
        size = fitting_block(wanted, wall, pattern.m)
        self.start = start.to(score.device)
        self.back = invert(self.start)
        self.score = rearrange(score[:, self.start], "r (b s) -> r b s", s=size)
        grouped = settings.relaxation == "insertion"
        columns = size // pattern.m if grouped else size
        here = torch.arange(size, device=score.device) * columns // size
        own = nn.functional.one_hot(here, columns).float() * settings.start_logit
        self.logits = nn.Parameter(own.repeat(self.score.shape[1], 1, 1))

    def order(self) -> Permutation:
        """The order as it stands, hard."""
        return compose(self.start, from_blocks(order_by(assign(self.logits))))

    def masks(self, temperature: float) -> dict[str, Float[Tensor, "out in"]]:
        """The masks of all readers, with gradients for the logits."""
        soft = sinkhorn(self.logits, temperature, self.settings.sinkhorn_iterations)
        if self.settings.relaxation == "insertion":
            column = assign(self.logits)
            mask = InsertionMask.apply(self.score, soft, column, self.pattern)
        else:
            if self.settings.relaxation == "straight_through":
                hard = nn.functional.one_hot(assign(soft), soft.shape[-1])
                soft = hard + soft - soft.detach()
            mask = permuted_mask(self.score, soft, self.pattern)
        return self.stacked.split(rearrange(mask, "r b s -> r (b s)")[:, self.back])


@dataclass
class Learned:
    """
    What learning leaves.

    :param perms: by space, the best order by the held-back text
    :param history: one entry a look: step, training loss, held-back loss, temperature
        and the share of channels that changed their group since the start
    """

    perms: dict[str, Permutation]
    history: list[dict[str, float]] = field(default_factory=list)


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

    The start is looked at first, so what comes back is never worse than the start on
    the held-back text. Weights are frozen. The same seed gives the same orders.

    :param stacks: by space
    :param start: by space
    :param other_masks: of pruned linears whose inputs no space orders, by module
    :param train: batches, used in random order, again and again
    :param held_back: batches that decide which order is kept; never trained on
    :raises ValueError: if a loss is not finite, or there is nothing to train on
    """
    if not train or not held_back:
        raise ValueError(
            f"learning needs text to train on and text held back, got {len(train)} and "
            f"{len(held_back)} batches; give the run more calibration samples"
        )
    orders = {
        name: LearnableOrder(stack, start[name], pattern, settings)
        for name, stack in stacks.items()
    }
    optimizer = torch.optim.AdamW(
        [order.logits for order in orders.values()],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )

    def look() -> tuple[float, dict[str, Permutation]]:
        perms = {name: order.order() for name, order in orders.items()}
        masks = dict(other_masks)
        for name, stack in stacks.items():
            masks |= stack.masks(perms[name], pattern)
        return mean_loss(model, masks, held_back, settings.loss), perms

    best, perms = look()
    learned = Learned(perms, [{"step": 0, "held_back": best}])
    batches = _shuffled(train, settings.seed)
    bar = tqdm(range(1, settings.steps + 1), desc="Learning the order")
    with frozen(model), torch.enable_grad():
        for step in bar:
            temperature = annealed(step - 1, settings.steps, *settings.temperature)
            value = _train_step(
                model, orders, other_masks, next(batches), temperature, settings
            )
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{value:.4f}", best=f"{best:.4f}", tau=f"{temperature:.3f}")
            if step % settings.evaluate_every and step != settings.steps:
                continue
            held, perms = look()
            learned.history.append(
                {
                    "step": step,
                    "loss": value,
                    "held_back": held,
                    "temperature": temperature,
                }
            )
            if held < best:
                best, learned.perms = held, perms
    logger.info(
        f"learned {len(orders)} orders in {settings.steps} steps: held-back loss "
        f"{learned.history[0]['held_back']:.4f} -> {best:.4f}"
    )
    return learned


def mean_loss(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    batches: Sequence[Batch],
    weights: LossWeights,
) -> float:
    """The loss of the model under the masks, the mean over the batches."""
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            batch = on_device(batch, model)
            dense = run(model, batch, weights)
            with masked(model, masks):
                total += float(loss(run(model, batch, weights), dense, batch, weights))
    return total / len(batches)


def _train_step(
    model: nn.Module,
    orders: Mapping[str, LearnableOrder],
    other_masks: Mapping[str, Tensor],
    batch: Batch,
    temperature: float,
    settings: LearnSettings,
) -> float:
    """One forward and backward pass; the gradients stay in the logits."""
    batch = on_device(batch, model)
    with torch.no_grad():
        dense = run(model, batch, settings.loss)
    masks = dict(other_masks)
    for order in orders.values():
        masks |= order.masks(temperature)
    with masked(model, masks):
        value = loss(run(model, batch, settings.loss), dense, batch, settings.loss)
        value.backward()
    if not bool(torch.isfinite(value)):
        raise ValueError(
            f"the training loss is {value.item()}; load the model in bfloat16 or float32 "
            "and check the calibration data"
        )
    return float(value)


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


def fitting_block(block_size: int, wall: int, m: int) -> int:
    """
    The largest multiple of M that divides the wall and is no larger than asked for.

    >>> fitting_block(64, 576, 4), fitting_block(64, 60, 4)
    (64, 60)
    """
    return max(s for s in range(m, min(block_size, wall) + 1, m) if wall % s == 0)
