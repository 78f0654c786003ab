# SPDX-License-Identifier: Apache-2.0
"""The dense model's outputs, for which it runs once a batch where it can."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nm_permute_plugin.pruning.running.loss import LossWeights, Outputs, run
from nm_permute_plugin.pruning.statistics import Batch, on_device

MOST_BYTES = 1 << 31
"""Of the device's memory for what is kept; batches beyond are run every time."""


class Teacher:
    """
    The dense model: what the pruned one is compared with, again and again.

    Logits are large, and what enters the output layer is small: that is kept, and the
    logits are made from it anew. Where the output layer is not the model's last
    operation, or the loss needs more than the logits, the model runs every time.

    :param weights: of the loss
    :param keep: False runs the model every time, for batches that come once
    """

    def __init__(
        self, model: nn.Module, weights: LossWeights, keep: bool = True
    ) -> None:
        self._model, self._weights = model, weights
        find: Callable[[], object] = getattr(
            model, "get_output_embeddings", lambda: None
        )
        head = find() if keep and not weights.needs_hidden else None
        self._head = head if isinstance(head, nn.Module) else None
        self._bytes = 0
        self._kept: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}

    def __call__(self, batch: Batch) -> Outputs:
        """
        The outputs for a batch, on the model's device, without gradients.

        :param batch: known again by the memory of its tokens, wherever it was sliced
        """
        ids = batch.get("input_ids")
        with torch.no_grad():
            if ids is None or self._head is None:
                return run(self._model, on_device(batch, self._model), self._weights)
            key = ids.data_ptr(), ids.shape
            if key not in self._kept:
                return self._run(key, ids, batch, self._head)
            _, entering = self._kept[key]
            return Outputs(self._head(entering))

    def _run(
        self,
        key: tuple[int, torch.Size],
        ids: Tensor,
        batch: Batch,
        head: nn.Module,
    ) -> Outputs:
        """Run the model, and keep what entered its output layer."""
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            out = run(self._model, on_device(batch, self._model), self._weights)
        finally:
            hook.remove()
        if not self._kept and not _makes(head, seen, out.logits):
            self._head = None
        elif self._bytes + seen[0].nbytes <= MOST_BYTES:
            self._bytes += seen[0].nbytes
            # The tokens are kept too, so that no other batch takes their place.
            self._kept[key] = ids, seen[0]
        return out


def _makes(
    head: nn.Module,
    entering: list[Tensor],
    logits: Float[Tensor, "*tokens vocabulary"],
) -> bool:
    """Whether what entered the output layer is all that the logits are made from."""
    return len(entering) == 1 and torch.equal(head(entering[0]), logits)
