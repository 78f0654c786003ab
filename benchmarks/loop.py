# SPDX-License-Identifier: Apache-2.0
"""Optimiser steps of learning, one at a time, for what the package's own loop hides."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from nm_permute_plugin.pruning.learn.loop import LearnSettings, frozen
from nm_permute_plugin.pruning.recover.student import endless
from nm_permute_plugin.pruning.running.backward import BackwardStep
from nm_permute_plugin.pruning.running.masked import Mask
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.statistics import Batch


def learning_steps(
    model: nn.Module,
    masks_at: Callable[[int], Mapping[str, Mask]],
    optimizer: torch.optim.Optimizer,
    train: Sequence[Batch],
    settings: LearnSettings,
) -> Iterator[tuple[int, float]]:
    """
    The number and the training loss of every step, each after it was taken.

    Batches, their order and the fall of the rate are those of ``learn_orders``.

    :param masks_at: the masks of all linears at a step, from 1 on, with gradients
    """
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 1 / settings.steps, total_iters=settings.steps
    )
    teacher = Teacher(model, settings.loss)
    order = endless(len(train), settings.seed)
    with frozen(model):
        for step in range(1, settings.steps + 1):
            with torch.enable_grad():
                backward = BackwardStep(
                    model,
                    partial(masks_at, step),
                    settings.loss,
                    settings.micro_batch_size,
                    teacher=teacher,
                )
                value = backward(train[next(order)])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            yield step, value
