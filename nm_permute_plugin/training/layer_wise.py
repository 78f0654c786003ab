# SPDX-License-Identifier: Apache-2.0
"""Learn the orders of one decoder layer after the other, for models that are large."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor, nn

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.training.blocks import Hidden
from nm_permute_plugin.training.kept import endless
from nm_permute_plugin.training.layers import (
    calls_of,
    check_layers,
    decoder_layers,
    run_layers,
)
from nm_permute_plugin.training.learn import (
    Learned,
    LearnSettings,
    descend,
    frozen,
    hard_masks,
    mean_loss,
)
from nm_permute_plugin.training.masking import Mask, masked
from nm_permute_plugin.training.objective import relative_error
from nm_permute_plugin.training.orders import LearnableOrders
from nm_permute_plugin.training.stacking import StackedScore
from nm_permute_plugin.training.statistics import Batch, token_mask
from nm_permute_plugin.training.step import check_finite

Hold = Callable[[], AbstractContextManager[None]]
"""A context in which offloaded weights stay where they were fetched to."""


def learn_layer_wise(
    model: nn.Module,
    stacks: Mapping[str, StackedScore],
    start: Mapping[str, Permutation],
    other_masks: Mapping[str, Tensor],
    train: Sequence[Batch],
    held_back: Sequence[Batch],
    pattern: NMPattern,
    settings: LearnSettings,
    hold: Hold = nullcontext,
) -> Learned:
    """
    Learn the orders that lie inside a decoder layer, layer by layer.

    What enters a layer comes from the pruned layers before it, what it shall give from the
    dense layers on their own inputs. A layer is learned for ``settings.steps`` steps on
    the relative error of its output; held-back rows choose its orders and multipliers, the
    start included. An order that several layers share, as the residual stream's, stays as
    it is; the multipliers of its readers are learned. Gradients, activations and scores of
    one layer at a time are on the model's device, the inputs of the next on the CPU.

    The arguments are those of ``learn_orders``, and scores and masks may be on another
    device than the model. ``settings.loss`` judges the whole at the end: if it is no better
    than the start, the start comes back.

    :param hold: entered for each layer: keeps offloaded weights where they were fetched to
    :raises ValueError: if there are no decoder layers, if they do not run on their own,
        or if an error is not finite
    """
    work = _Work(model, stacks, start, other_masks, [*train, *held_back], len(train))
    learned = Learned(dict(start))
    before = work.loss(learned, held_back, pattern, settings)
    for index, layer in enumerate(work.layers.modules):
        # Weights that are fetched for every use would be frozen, and forgotten.
        with hold(), frozen(layer), torch.enable_grad():
            _learn_layer(work, index, learned, pattern, settings)
    after = work.loss(learned, held_back, pattern, settings)
    logger.info(
        f"learned {len(work.layers)} layers in {settings.steps} steps each: held-back "
        f"loss {before:.4f} -> {after:.4f}"
    )
    if after >= before:
        learned = Learned(dict(start))
    learned.history = [
        {"step": 0, "held_back": before},
        {"step": settings.steps, "held_back": after},
    ]
    return learned


def part_of(stack: StackedScore, prefix: str) -> StackedScore | None:
    """Those readers of a space whose names begin so; None if there are none."""
    readers = stack.space.readers
    inside = [i for i, reader in enumerate(readers) if reader.name.startswith(prefix)]
    if len(inside) == len(readers):
        return stack
    if not inside:
        return None
    parts = stack.parts()
    return StackedScore(
        replace(stack.space, readers=tuple(readers[i] for i in inside)),
        torch.cat([parts[i] for i in inside]),
        tuple(stack.rows[i] for i in inside),
    )


@dataclass
class _Work:
    """
    The layers, and what enters them for every batch; the held-back batches come last.

    :ivar dense: what enters the layer at hand in the dense model
    :ivar pruned: the same behind the pruned layers
    """

    model: nn.Module
    stacks: Mapping[str, StackedScore]
    start: Mapping[str, Permutation]
    other_masks: Mapping[str, Tensor]
    batches: list[Batch]
    train: int

    def __post_init__(self) -> None:
        readers = [r.name for s in self.stacks.values() for r in s.space.readers]
        self.layers = decoder_layers(self.model, [*self.other_masks, *readers])
        check_layers(self.model, self.layers, self.batches)
        self.dense: list[Hidden] = [
            calls_of(self.model, self.layers, batch).hidden.cpu()
            for batch in self.batches
        ]
        self.pruned = list(self.dense)

    def inside(self, index: int) -> dict[str, StackedScore]:
        """What of every space the layer reads, on the model's device."""
        prefix = f"{self.layers.names[index]}."
        parts = {name: part_of(stack, prefix) for name, stack in self.stacks.items()}
        device = next(self.model.parameters()).device
        return {
            name: part.to(device) for name, part in parts.items() if part is not None
        }

    def others(self, index: int) -> dict[str, Tensor]:
        """The masks of the layer's linears that no space orders."""
        prefix = f"{self.layers.names[index]}."
        masks = self.other_masks.items()
        return {name: mask for name, mask in masks if name.startswith(prefix)}

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

    def loss(
        self,
        learned: Learned,
        batches: Sequence[Batch],
        pattern: NMPattern,
        settings: LearnSettings,
    ) -> float:
        """Of the whole model."""
        masks = hard_masks(
            self.stacks, learned.perms, self.other_masks, pattern, learned.multipliers
        )
        return mean_loss(self.model, masks, batches, settings.loss)


def _learn_layer(
    work: _Work,
    index: int,
    learned: Learned,
    pattern: NMPattern,
    settings: LearnSettings,
) -> None:
    """Learn one layer, add what was found to ``learned``, and pass all batches on."""
    inside, others = work.inside(index), work.others(index)
    shared = {n for n, s in inside.items() if len(s.rows) < len(work.stacks[n].rows)}
    work.pass_on(work.dense, index)

    def hard(now: Learned) -> dict[str, Tensor]:
        return hard_masks(inside, now.perms, others, pattern, now.multipliers)

    def look(now: Learned) -> float:
        judges = range(work.train, len(work.batches))
        with torch.no_grad():
            masks = hard(now)
            errors = [float(work.error(number, index, masks)) for number in judges]
        return check_finite(sum(errors) / len(errors), "held-back")

    if inside:
        dtype = next(work.model.parameters()).dtype
        orders = LearnableOrders(
            inside, work.start, pattern, settings.shape, dtype, fixed=shared
        )
        numbers = endless(work.train, settings.seed)

        def step(tau: float, number: int) -> float:
            masks = {**others, **orders.masks(tau, number)}
            error = work.error(next(numbers), index, masks)
            error.backward()
            return check_finite(float(error.detach()), "training")

        found = descend(
            orders, step, look, settings, f"Learning {work.layers.names[index]}"
        )
        learned.perms |= {name: found.perms[name] for name in inside.keys() - shared}
        learned.multipliers |= found.multipliers
    now = Learned({name: learned.perms[name] for name in inside}, learned.multipliers)
    with masked(work.model, hard(now)):
        work.pass_on(work.pruned, index)
