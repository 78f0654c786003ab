# SPDX-License-Identifier: Apache-2.0
"""The kept weights of the whole model trained to predict what the dense model predicts."""

from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm import tqdm

from nm_permute_plugin.pruning.learn.loop import frozen
from nm_permute_plugin.pruning.recover.student import (
    KeptWeights,
    Optimizer,
    Values,
    endless,
)
from nm_permute_plugin.pruning.running.backward import BackwardStep
from nm_permute_plugin.pruning.running.loss import LossWeights
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.samples import Samples

Look = dict[str, int | float]


@dataclass(frozen=True)
class DistillSettings:
    """
    How the whole model is trained under its masks.

    :param steps: optimiser steps, a batch each
    :param rate: of AdamW, relative to the size of the weights (``kept.Optimizer``)
    :param evaluate_every: steps between two looks at the validation samples
    :param seed: of the order of the batches
    :param loss: weights of the loss
    """

    steps: int = 200
    rate: float = 0.003
    evaluate_every: int = 20
    seed: int = 0
    loss: LossWeights = field(default_factory=LossWeights)


def distill(
    kept: KeptWeights, samples: Samples, settings: DistillSettings
) -> tuple[Values, list[Look]]:
    """
    Train all kept weights against the dense model's predictions; the masks stay.

    :return: the best values by the validation samples, none if none are better, and one
        look an evaluation: step, validation loss and, from the first step on, training loss
    :raises ValueError: if a loss is not finite
    """
    masters = kept.masters(kept.linears)
    optimizer = Optimizer(masters, settings.rate, settings.steps)
    order = endless(len(samples.train), settings.seed)
    best = kept.mean_loss(samples.validation, settings.loss)
    better: Values = {}
    looks: list[Look] = [{"step": 0, "validation": best}]
    bar = tqdm(range(1, settings.steps + 1), desc="Distilling the kept weights")
    backward = BackwardStep(
        kept.model,
        partial(kept.masks, masters),
        settings.loss,
        teacher=Teacher(kept.model, settings.loss),
        replay=True,
    )
    with frozen(kept.model), torch.enable_grad():
        for step in bar:
            training = backward(samples.train[next(order)])
            optimizer.step()
            bar.set_postfix(loss=f"{training:.4f}", best=f"{best:.4f}")
            if step % settings.evaluate_every and step != settings.steps:
                continue
            now = kept.rounded(masters)
            held = kept.mean_loss(samples.validation, settings.loss, now)
            looks.append({"step": step, "validation": held, "loss": training})
            if held < best:
                best, better = held, now
    return better, looks
