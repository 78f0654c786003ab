# SPDX-License-Identifier: Apache-2.0
"""Decoder layers rebuilt one window after the other, under the masks as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from nm_permute_plugin.pruning.learn.loop import frozen
from nm_permute_plugin.pruning.recover.student import (
    KeptWeights,
    Optimizer,
    Values,
    endless,
)
from nm_permute_plugin.pruning.running.decoder_layers import (
    calls_of,
    check_layers,
    decoder_layers,
    run_layers,
)
from nm_permute_plugin.pruning.running.loss import check_finite, relative_error
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.statistics import token_mask

Look = dict[str, int | float]
Hidden = Float[Tensor, "*_places _width"]  # batches differ


@dataclass(frozen=True)
class BlockSettings:
    """
    How decoder layers are rebuilt.

    :param window: decoder layers that are trained together
    :param epochs: passes over the training samples, a window
    :param rate: of AdamW, relative to the size of the weights (``kept.Optimizer``)
    :param seed: of the order of the batches
    """

    window: int = 1
    epochs: int = 4
    rate: float = 0.01
    seed: int = 0


def rebuild_blocks(
    kept: KeptWeights, samples: Samples, settings: BlockSettings
) -> tuple[Values, list[Look]]:
    """
    Train the kept weights of every window of decoder layers to give the dense outputs.

    After https://arxiv.org/abs/2510.14444. What enters a window comes from the pruned and
    already rebuilt layers before it, what it shall give from the dense layers on their own
    inputs: errors are corrected, not copied. New weights are taken only where the
    validation rows' error falls. The activations of one window at a time stay on the CPU.

    :return: the new values, and one look a window: its first layer, validation error
        before and after
    :raises ValueError: if there are no decoder layers, if they do not run on their own,
        or if an error is not finite
    """
    work = _Work(kept, samples)
    dense = [calls_of(kept.model, work.layers, b).hidden.cpu() for b in work.batches]
    pruned = list(dense)
    values: Values = {}
    looks: list[Look] = []
    starts = range(0, len(work.layers), settings.window)
    with frozen(kept.model):
        for first in tqdm(starts, desc="Rebuilding decoder layers"):
            span = range(first, min(first + settings.window, len(work.layers)))
            for i, hidden in enumerate(dense):
                dense[i] = work.forward(i, span, hidden)
            better, look = _rebuild(work, span, pruned, dense, settings)
            values |= better
            looks.append(look)
            with kept.running(values):
                for i, hidden in enumerate(pruned):
                    pruned[i] = work.forward(i, span, hidden)
    return values, looks


class _Work:
    """The layers and the samples of a run; the validation batches come last."""

    def __init__(self, kept: KeptWeights, samples: Samples) -> None:
        self.kept = kept
        self.layers = decoder_layers(kept.model, kept.linears)
        check_layers(kept.model, self.layers, samples.validation)
        self.batches = [*samples.train, *samples.validation]
        self.train = len(samples.train)
        self.judges = range(self.train, len(self.batches))

    def run(self, index: int, span: range, hidden: Hidden) -> Hidden:
        """One batch through the layers of the span, on the model's device."""
        calls = calls_of(self.kept.model, self.layers, self.batches[index])
        entering = hidden.to(calls.hidden.device)
        return run_layers(self.layers, calls, span, entering)

    def forward(self, index: int, span: range, hidden: Hidden) -> Hidden:
        """Like ``run``, without gradients, to the CPU."""
        with torch.no_grad():
            return self.run(index, span, hidden).cpu()

    def error(
        self, index: int, span: range, hidden: Hidden, target: Hidden
    ) -> Float[Tensor, ""]:
        """The error of one batch through the layers of the span."""
        out = self.run(index, span, hidden)
        counted = token_mask(self.batches[index]).to(out.device)
        return relative_error(out, target.to(out.device), counted)

    def judge(
        self,
        values: Mapping[str, Tensor],
        span: range,
        inputs: Sequence[Hidden],
        targets: Sequence[Hidden],
    ) -> float:
        """The error on the validation batches with some values put in."""
        with torch.no_grad(), self.kept.running(values):
            errors = [
                float(self.error(i, span, inputs[i], targets[i])) for i in self.judges
            ]
        return check_finite(
            sum(errors) / len(errors), "validation error of the recovery"
        )


def _rebuild(
    work: _Work,
    span: range,
    inputs: Sequence[Hidden],
    targets: Sequence[Hidden],
    settings: BlockSettings,
) -> tuple[Values, Look]:
    """The best values of one window by the validation batches; none if none are better."""
    names = [f"{work.layers.names[index]}." for index in span]
    masters = work.kept.masters(
        x for x in work.kept.linears if x.startswith(tuple(names))
    )
    before = best = work.judge({}, span, inputs, targets)
    better: Values = {}
    look: Look = {"layer": span.start, "before": before, "after": best}
    if not masters:
        return better, look
    optimizer = Optimizer(masters, settings.rate, settings.epochs * work.train)
    order = endless(work.train, settings.seed)
    for _ in range(settings.epochs):
        for index in islice(order, work.train):
            with torch.enable_grad(), work.kept.running(masters):
                error = work.error(index, span, inputs[index], targets[index])
            check_finite(float(error.detach()), "training error of the recovery")
            error.backward()
            optimizer.step()
        now = work.kept.rounded(masters)
        held = work.judge(now, span, inputs, targets)
        if held < best:
            best, better = held, now
    logger.debug(
        f"layers from {span.start}: validation error {before:.4f} -> {best:.4f}"
    )
    return better, look | {"after": best}
