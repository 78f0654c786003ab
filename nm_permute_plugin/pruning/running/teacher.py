# SPDX-License-Identifier: Apache-2.0
"""The dense model's outputs: it runs once a batch where it can."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import Batch, on_device
from nm_permute_plugin.pruning.running.loss import Outputs, check_finite, loss, run
from nm_permute_plugin.pruning.running.masked import Mask, masked
from nm_permute_plugin.pruning.settings import LossSettings

MOST_BYTES = 1 << 31
"""Bytes of the device's memory that hold what is kept; batches beyond run every time."""


VISITS = 5
"""Visits of a training batch from which on it pays on a GPU to keep its dense outputs: the
dense model then runs outside of the step's CUDA graph, where it waits for its launches."""


def pays_to_keep(model: nn.Module, steps: int, batches: int) -> bool:
    """
    Whether dense outputs of training batches are worth being kept.

    :param steps: training steps that will be taken, a batch each
    """
    return next(model.parameters()).device.type != "cuda" or steps >= VISITS * batches


class Teacher:
    """
    The dense model, with which the pruned one is compared again and again.

    Logits are large, and what enters the output layer is small: that is kept, and the
    logits are made from it anew. Where the output layer is not the model's last
    operation, or the loss needs more than the logits, the model runs every time.

    :param loss: the loss that compares
    :param keep: false runs the model every time, for batches that come once
    :param keep_training: false does so for training batches alone, see ``known``
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossSettings,
        keep: bool = True,
        keep_training: bool = True,
    ) -> None:
        self.model, self.loss, self.keep_training = model, loss, keep_training
        find: Callable[[], object] = getattr(
            model, "get_output_embeddings", lambda: None
        )
        head = find() if keep and not loss.needs_hidden else None
        self._head = head if isinstance(head, nn.Module) else None
        self._kept: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
        self._bytes = 0
        self._is_full = False

    def __call__(self, batch: Batch) -> Outputs:
        """
        The dense outputs for a batch, on the model's device, without gradients.

        :param batch: recognised by the memory of its tokens, wherever it was sliced; the
            mask that belongs to tokens never changes
        """
        known = self._known(batch, keep=True)
        return self.anew(on_device(batch, self.model)) if known is None else known

    def known(self, batch: Batch) -> Outputs | None:
        """
        The dense outputs for a training batch, as a call gives them, but None where the
        model would run and nothing would be kept of it.
        """
        return self._known(batch, self.keep_training)

    def anew(self, batch: Batch) -> Outputs:
        """The dense outputs for a batch that is on the model's device; nothing is kept."""
        with torch.no_grad():
            return run(self.model, batch, self.loss)

    def validate(self, masks: Mapping[str, Mask], batches: Sequence[Batch]) -> float:
        """
        The loss of the model under masks against the dense one, the mean over the batches.

        :param masks: by linear
        :raises ValueError: if the loss is not finite
        """
        total = 0.0
        with torch.no_grad():
            for turn, batch in enumerate(batches):
                part, share = ranks.own_part(batch, turn)
                dense = self(part)
                part = on_device(part, self.model)
                with masked(self.model, masks):
                    ours = run(self.model, part, self.loss)
                total += share * float(loss(ours, dense, part, self.loss))
        return check_finite(ranks.total(total), "validation loss") / len(batches)

    def bytes_to_come(self, batches: Sequence[Batch]) -> int:
        """The memory that will be taken for batches that were not kept yet, at most."""
        if self._head is None:
            return 0
        places = sum(ids.numel() for ids, _ in self._kept.values())
        if not places:
            return MOST_BYTES
        ids = [batch["input_ids"] for batch in batches]
        ours = {one.untyped_storage().data_ptr() for one in ids}
        kept = sum(
            one.numel()
            for one, _ in self._kept.values()
            if one.untyped_storage().data_ptr() in ours
        )
        missing = max(0, sum(one.numel() for one in ids) - kept)
        return min(MOST_BYTES - self._bytes, self._bytes // places * missing)

    def share_kept(self, batches: Sequence[Batch]) -> float:
        """
        The share of batches for which the dense model runs once only, if one has been seen.
        """
        places = sum(ids.numel() for ids, _ in self._kept.values())
        if self._head is None or not places:
            return 0.0
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        return min(1.0, MOST_BYTES / (self._bytes / places * tokens))

    def fold(self, perm: Permutation | None) -> None:
        """
        Follow a fold of the model: what is kept enters the output layer in a new order.

        :param perm: of the channels that enter the output layer; None forgets what is kept
        """
        if perm is None:
            self._kept, self._bytes, self._is_full = {}, 0, False
        else:
            self._kept = {
                key: (ids, entering[..., perm.to(entering.device)])
                for key, (ids, entering) in self._kept.items()
            }

    def _known(self, batch: Batch, keep: bool) -> Outputs | None:
        ids = batch.get("input_ids")
        if ids is None or self._head is None:
            return None
        key = ids.data_ptr(), ids.shape
        with torch.no_grad():
            if key in self._kept:
                logits = self._head(self._kept[key][1])
                return Outputs(logits, are_values=logits.shape[-1] == 1)
            if self._is_full or not keep:
                return None
            return self._run(key, ids, batch, self._head)

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
            out = run(self.model, on_device(batch, self.model), self.loss)
        finally:
            hook.remove()
        if not self._kept and not _makes(head, seen, out.logits):
            self._head = None
        elif self._bytes + seen[0].nbytes <= MOST_BYTES:
            self._bytes += seen[0].nbytes
            # The tokens are kept too, so that no other batch takes their place in memory.
            self._kept[key] = ids, seen[0]
        elif self._kept:
            least = min(entering.nbytes for _, entering in self._kept.values())
            self._is_full = seen[0].nbytes <= least
        return out


def _makes(
    head: nn.Module,
    entering: list[Tensor],
    logits: Float[Tensor, "*tokens vocabulary"],
) -> bool:
    """Whether what entered the output layer is all that the logits are made from."""
    return len(entering) == 1 and torch.equal(head(entering[0]), logits)
