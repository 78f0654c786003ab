# SPDX-License-Identifier: Apache-2.0
"""Forward and backward over a batch under masks, in as little memory as there is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import Batch, micro_batches, on_device
from nm_permute_plugin.pruning.running.cuda_graph import CudaGraphs
from nm_permute_plugin.pruning.running.loss import Outputs, check_finite, loss, run
from nm_permute_plugin.pruning.running.masked import masked
from nm_permute_plugin.pruning.running.memory import (
    Masks,
    checkpointed,
    layers_to_checkpoint,
)
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import MemorySettings


class Backward:
    """
    Forward and backward over a batch; the gradients stay with what the masks are made from.

    Where there are several ranks, each runs its rows of the batch, and gradients are sums
    over all of them.

    :param teacher: the dense model, and the loss
    :param masks: makes the masks, anew for every micro-batch
    :param parameters: that get gradients, in the order of the forward pass
    :param batches: the training batches, which tell how much memory a step needs
    :param use_graph: let a GPU that waits for launches run micro-batches as CUDA graphs.
        Tensors that masks are made from then stay where they are in memory, every step does
        the same operations, and gradients are zeroed in place
    """

    def __init__(
        self,
        teacher: Teacher,
        masks: Masks,
        parameters: Iterable[Tensor],
        batches: Sequence[Batch],
        settings: MemorySettings,
        use_graph: bool,
    ) -> None:
        self._sums, self._turn = ranks.GradientSums(parameters), 0
        self._teacher, self._size = teacher, settings.micro_batch_size
        layers = layers_to_checkpoint(teacher, masks, batches, settings)
        # Bound to no method of this object: graphs would outlive it, and their memory too.
        micro_batch = partial(_micro_batch, teacher, masks, layers)
        self._run = CudaGraphs(micro_batch) if use_graph else micro_batch

    def __call__(
        self, batch: Batch, prepare: Callable[[], object] = lambda: None
    ) -> float:
        """
        Leave the gradients of a batch, and return its loss.

        A micro-batch weighs as many tokens as count in it, so that rows of one length give
        the gradient of the whole batch.

        :param prepare: called before the masks are made
        :raises ValueError: if the loss is not finite
        """
        total = 0.0
        model = self._teacher.model
        parts = list(own_micro_batches(batch, self._turn, self._size))
        self._turn += 1
        for number, (part, share) in enumerate(parts, 1):
            if number == len(parts):
                self._sums.last_backward()
            dense = self._teacher.known(part)
            part = on_device(part, model)
            prepare()
            # A tensor: every share would be a CUDA graph of its own.
            weight = torch.tensor(share, device=next(iter(part.values())).device)
            known = None
            if dense is not None:
                known = dense.logits, dense.hidden, dense.are_values
            value = self._run(part, known, weight)
            total += float(value)
        self._sums.finish()
        return check_finite(ranks.total(total), "training loss")


def own_micro_batches(
    batch: Batch, turn: int, size: int | None
) -> Iterator[tuple[Batch, float]]:
    """The micro-batches of this rank, with their shares of all that counts in the batch."""
    own, share = ranks.own_part(batch, turn)
    for part, of_own in micro_batches(own, size):
        yield part, share * of_own


def _micro_batch(
    teacher: Teacher,
    masks: Masks,
    layers: Sequence[nn.Module],
    part: Batch,
    known: tuple[Tensor, tuple[Tensor, ...], bool] | None,
    share: Tensor,
) -> Tensor:
    """
    The loss of a micro-batch, times its share, after its backward pass.

    :param known: the fields of the dense ``Outputs``; None runs the dense model
    """
    model, weights = teacher.model, teacher.loss
    dense = Outputs(*known) if known else teacher.anew(part)
    with masked(model, masks()), checkpointed(layers):
        ours = run(model, part, weights)
        value = share * loss(ours, dense, part, weights)
        value.backward()
    return value.detach()
