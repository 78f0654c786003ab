# SPDX-License-Identifier: Apache-2.0
"""Forward and backward over a batch under masks, in as little memory as there is."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from nm_permute_plugin.pruning.running.cuda_graph import Replay
from nm_permute_plugin.pruning.running.loss import (
    LossWeights,
    Outputs,
    check_finite,
    loss,
    run,
)
from nm_permute_plugin.pruning.running.masked import Mask, masked
from nm_permute_plugin.pruning.running.memory import (
    checkpointed,
    free_bytes,
    kept_bytes,
    repeated_layers,
)
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.statistics import (
    Batch,
    first_sample,
    on_device,
    token_mask,
)

Masks = Callable[[], Mapping[str, Mask]]
"""Makes the masks of a step, by linear."""


class BackwardStep:
    """
    Forward and backward over a batch; the gradients stay behind the masks.

    :param masks: asked anew for every part of a batch
    :param micro_batch_size: rows at a time; a part weighs as many tokens as count in it,
        so rows of one length have the gradient of the whole batch. None: all of them
    :param layers: that keep only what enters them, and run again in backward
    :param teacher: the dense model, which runs for every batch by default
    :param replay: let a GPU that waits for launches run parts as CUDA graphs; the masks
        are then made from what stays where it is in memory, the same way every time, and
        ``.grad`` is cleared in place
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        weights: LossWeights,
        micro_batch_size: int | None = None,
        layers: Sequence[nn.Module] = (),
        teacher: Teacher | None = None,
        replay: bool = False,
    ) -> None:
        self._model, self._masks, self._weights = model, masks, weights
        self._micro_batch_size, self._layers = micro_batch_size, layers
        self._teacher = teacher or Teacher(model, weights, keep=False)
        self._part = Replay(self._backward) if replay else self._backward

    def __call__(
        self, batch: Batch, prepare: Callable[[], object] = lambda: None
    ) -> float:
        """
        The loss.

        :param prepare: called before the masks are made, once the dense model has been
            set to work
        :raises ValueError: if the loss is not finite
        """
        total = 0.0
        for part, share in parts(batch, self._micro_batch_size):
            dense = self._teacher(part)
            part = on_device(part, self._model)
            prepare()
            value = self._part(part, dense.logits, dense.hidden, dense.is_hidden, share)
            total += float(value)
        return check_finite(total, "training loss")

    def _backward(
        self,
        part: Batch,
        logits: Tensor,
        hidden: tuple[Tensor, ...],
        is_hidden: bool,
        share: float,
    ) -> Tensor:
        """The loss of a part, times its share, after its backward pass."""
        dense = Outputs(logits, hidden, is_hidden)
        with masked(self._model, self._masks()), checkpointed(self._layers):
            ours = run(self._model, part, self._weights)
            value = share * loss(ours, dense, part, self._weights)
            value.backward()
        return value.detach()


def layers_to_checkpoint(
    model: nn.Module,
    linears: Sequence[str],
    masks: Masks,
    batch: Batch,
    weights: LossWeights,
    micro_batch_size: int | None = None,
    wanted: bool | None = None,
) -> list[nn.Module]:
    """
    The layers to run again in backward: all that hold any of the linears, or none.

    :param wanted: None: all where the activations of a step would take more than half of
        what is left of a GPU's memory, which one row of the batch is run for
    """
    if wanted is None:
        free = free_bytes(next(model.parameters()).device)
        wanted = (
            free is not None
            and 2 * activation_bytes(model, masks, batch, weights, micro_batch_size)
            > free
        )
    return repeated_layers(model, linears) if wanted else []


def activation_bytes(
    model: nn.Module,
    masks: Masks,
    batch: Batch,
    weights: LossWeights,
    micro_batch_size: int | None = None,
) -> int:
    """What a step keeps between forward and backward, estimated from one row."""
    one = first_sample(batch)
    rows = len(token_mask(batch)) // len(token_mask(one))
    row = on_device(one, model)
    dense = Teacher(model, weights, keep=False)(row)
    with torch.enable_grad(), masked(model, masks()):
        of_row = kept_bytes(
            model, lambda: loss(run(model, row, weights), dense, row, weights)
        )
    return of_row * min(rows, micro_batch_size or rows)


def parts(batch: Batch, size: int | None) -> Iterator[tuple[Batch, float]]:
    """Rows or images of a batch, so many at a time, with their share of its tokens."""
    counted: Tensor = token_mask(batch)
    if size is None or len(counted) <= size:
        # A single sample of text has other lengths beside it: the patches of its images.
        yield batch, 1.0
        return
    for first in range(0, len(counted), size):
        rows = slice(first, first + size)
        share = float(counted[rows].sum() / counted.sum())
        yield {name: tensor[rows] for name, tensor in batch.items()}, share
