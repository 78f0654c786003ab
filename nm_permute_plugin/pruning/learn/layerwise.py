# SPDX-License-Identifier: Apache-2.0
"""Learn the orders of one decoder layer after the other, for models that are large."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor

from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.pruning.learn.loop import LearnSettings, descend, frozen
from nm_permute_plugin.pruning.learn.orders import LearnableOrders
from nm_permute_plugin.pruning.problem import Learned, Subject
from nm_permute_plugin.pruning.recover.blocks import Hidden
from nm_permute_plugin.pruning.recover.student import endless
from nm_permute_plugin.pruning.running.decoder_layers import (
    calls_of,
    check_layers,
    decoder_layers,
    run_layers,
)
from nm_permute_plugin.pruning.running.loss import check_finite, relative_error
from nm_permute_plugin.pruning.running.masked import Mask, masked
from nm_permute_plugin.pruning.stacking import StackedScore
from nm_permute_plugin.pruning.statistics import token_mask

Hold = Callable[[], AbstractContextManager[None]]
"""A context in which offloaded weights stay where they were fetched to."""


def learn_layer_wise(
    subject: Subject,
    start: Mapping[str, Permutation],
    settings: LearnSettings,
    hold: Hold = nullcontext,
) -> Learned:
    """
    Learn the orders that lie inside a decoder layer, layer by layer.

    What enters a layer comes from the pruned layers before it, what it shall give from the
    dense layers on their own inputs. A layer is learned for ``settings.steps`` steps on
    the relative error of its output; validation rows choose its orders and multipliers, the
    start included. An order that several layers share, as the residual stream's, stays as
    it is; the multipliers of its consumers are learned. Gradients, activations and scores
    of one layer at a time are where the model runs, the inputs of the next on the CPU.

    ``settings.loss`` judges the whole at the end: if it is no better than the start, the
    start comes back.

    :param start: by space
    :param hold: entered for each layer: keeps offloaded weights where they were fetched to
    :raises ValueError: if there are no decoder layers, if they do not run on their own,
        or if an error is not finite
    """
    work = _Work(subject)
    learned = Learned(dict(start))
    before = subject.validation_loss(learned, settings.loss)
    for index, layer in enumerate(work.layers.modules):
        # Weights that are fetched for every use would be frozen, and forgotten.
        with hold(), frozen(layer), torch.enable_grad():
            _learn_layer(work, index, start, learned, settings)
    after = subject.validation_loss(learned, settings.loss)
    logger.info(
        f"learned {len(work.layers)} layers in {settings.steps} steps each: validation "
        f"loss {before:.4f} -> {after:.4f}"
    )
    if after >= before:
        learned = Learned(dict(start))
    learned.history = [
        {"step": 0, "validation": before},
        {"step": settings.steps, "validation": after},
    ]
    return learned


def part_of(stack: StackedScore, prefix: str) -> StackedScore | None:
    """Those consumers of a space whose names begin so; None if there are none."""
    consumers = stack.space.consumers
    inside = [
        i for i, consumer in enumerate(consumers) if consumer.name.startswith(prefix)
    ]
    if len(inside) == len(consumers):
        return stack
    if not inside:
        return None
    parts = stack.parts()
    return StackedScore(
        replace(stack.space, consumers=tuple(consumers[i] for i in inside)),
        torch.cat([parts[i] for i in inside]),
        tuple(stack.rows[i] for i in inside),
    )


class _Work:
    """
    The layers, and what enters them for every batch; the validation batches come last.

    :ivar dense: what enters the layer at hand in the dense model
    :ivar pruned: the same behind the pruned layers
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.model = subject, subject.model
        self.batches = [*subject.samples.train, *subject.samples.validation]
        self.layers = decoder_layers(self.model, subject.linears)
        check_layers(self.model, self.layers, self.batches)
        self.dense: list[Hidden] = [
            calls_of(self.model, self.layers, batch).hidden.cpu()
            for batch in self.batches
        ]
        self.pruned = list(self.dense)

    def inside(self, index: int) -> Subject:
        """What is in the layer alone, its scores where the model runs."""
        prefix, whole = f"{self.layers.names[index]}.", self.subject
        parts = {name: part_of(stack, prefix) for name, stack in whole.stacks.items()}
        device = whole.device
        return replace(
            whole,
            stacks={
                n: part.to(device) for n, part in parts.items() if part is not None
            },
            others={n: m for n, m in whole.others.items() if n.startswith(prefix)},
        )

    def run(self, number: int, index: int, hidden: Hidden) -> Hidden:
        """A batch through a layer."""
        calls = calls_of(self.model, self.layers, self.batches[number])
        entering = hidden.to(calls.hidden.device)
        return run_layers(self.layers, calls, range(index, index + 1), entering)

    def pass_on(self, hidden: list[Hidden], index: int) -> None:
        """All batches through a layer, in place, without gradients."""
        with torch.no_grad():
            for number, entering in enumerate(hidden):
                hidden[number] = self.run(number, index, entering).cpu()

    def error(
        self, number: int, index: int, masks: Mapping[str, Mask]
    ) -> Float[Tensor, ""]:
        """The error of a batch behind the layer; ``dense`` has passed it already."""
        with masked(self.model, masks):
            out = self.run(number, index, self.pruned[number])
        counted = token_mask(self.batches[number]).to(out.device)
        return relative_error(out, self.dense[number].to(out.device), counted)


def _learn_layer(
    work: _Work,
    index: int,
    start: Mapping[str, Permutation],
    learned: Learned,
    settings: LearnSettings,
) -> None:
    """Learn one layer, add what was found to ``learned``, and pass all batches on."""
    inside, whole = work.inside(index), work.subject
    stacks, train = inside.stacks, len(whole.samples.train)
    shared = {n for n, s in stacks.items() if len(s.rows) < len(whole.stacks[n].rows)}
    work.pass_on(work.dense, index)

    def look(now: Learned, step: int) -> float:
        judges = range(train, len(work.batches))
        with torch.no_grad():
            masks = inside.masks(now)
            errors = [float(work.error(number, index, masks)) for number in judges]
        return check_finite(sum(errors) / len(errors), "validation loss")

    if stacks:
        orders = LearnableOrders(
            stacks, start, whole.pattern, settings.shape, whole.dtype, fixed=shared
        )
        numbers = endless(train, settings.seed)

        def step(tau: float, number: int) -> float:
            masks = {**inside.others, **orders.at(tau, number).masks()}
            error = work.error(next(numbers), index, masks)
            error.backward()
            return check_finite(float(error.detach()), "training loss")

        found = descend(
            orders, lambda: step, look, settings, f"Learning {work.layers.names[index]}"
        )
        learned.perms |= {name: found.perms[name] for name in stacks.keys() - shared}
        learned.multipliers |= found.multipliers
    with masked(work.model, inside.masks(learned)):
        work.pass_on(work.pruned, index)
