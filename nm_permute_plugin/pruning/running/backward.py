# SPDX-License-Identifier: Apache-2.0
"""Forward and backward over a batch under masks, in as little memory as there is."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

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

    :param teacher: the dense model, and the loss
    :param masks: makes the masks, anew for every micro-batch
    :param batches: the training batches, which tell how much memory a step needs
    :param use_graph: let a GPU that waits for launches run micro-batches as CUDA graphs.
        Tensors that masks are made from then stay where they are in memory, every step does
        the same operations, and gradients are zeroed in place
    """

    def __init__(
        self,
        teacher: Teacher,
        masks: Masks,
        batches: Sequence[Batch],
        settings: MemorySettings,
        use_graph: bool,
    ) -> None:
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

        :param prepare: called once the dense model has been set to work, before the masks
            are made
        :raises ValueError: if the loss is not finite
        """
        total = 0.0
        model = self._teacher.model
        for part, share in micro_batches(batch, self._size):
            dense = self._teacher(part)
            part = on_device(part, model)
            prepare()
            # A tensor: every share would be a CUDA graph of its own.
            weight = torch.tensor(share, device=dense.logits.device)
            value = self._run(
                part, dense.logits, dense.hidden, dense.are_values, weight
            )
            total += float(value)
        return check_finite(total, "training loss")


def _micro_batch(
    teacher: Teacher,
    masks: Masks,
    layers: Sequence[nn.Module],
    part: Batch,
    logits: Tensor,
    hidden: tuple[Tensor, ...],
    are_values: bool,
    share: Tensor,
) -> Tensor:
    """The loss of a micro-batch, times its share, after its backward pass."""
    model, weights = teacher.model, teacher.loss
    dense = Outputs(logits, hidden, are_values)
    with masked(model, masks()), checkpointed(layers):
        ours = run(model, part, weights)
        value = share * loss(ours, dense, part, weights)
        value.backward()
    return value.detach()
