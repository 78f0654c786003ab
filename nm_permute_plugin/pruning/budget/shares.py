# SPDX-License-Identifier: Apache-2.0
"""How much of a loss each group of masks is to blame for: integrated gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.budget.fused import FusedLinears
from nm_permute_plugin.pruning.data import Batch
from nm_permute_plugin.pruning.running.backward import Backward
from nm_permute_plugin.pruning.running.masked import frozen
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import MemorySettings

POINTS = 4
"""Gradients on the way from pruned to dense; of SmolLM2 the shares then add up to within
1 % of the loss."""


@dataclass(frozen=True)
class HalfOpenMask:
    """
    A mask that is partly open: what it drops counts by a number from 0 to 1.

    :param mask: True where a weight is kept, [out, in]
    :param opening: the number, which gets the gradient
    :param dtype: of the weight
    """

    mask: Bool[Tensor, "_out _in"]
    opening: Float[Tensor, ""]
    dtype: torch.dtype

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The opening."""
        return (self.opening,)

    def kept(self) -> Float[Tensor, "_out _in"]:
        """1 where a weight is kept, the opening elsewhere."""
        opening = self.opening.detach().to(self.mask.device, self.dtype)
        return torch.where(self.mask, torch.ones_like(opening), opening)

    def gradients(self, of_mask: Float[Tensor, "_out _in"]) -> tuple[Tensor, ...]:
        """The gradient of the opening."""
        of_dropped = of_mask.masked_fill(self.mask.to(of_mask.device), 0)
        return (of_dropped.sum(dtype=torch.float32).to(self.opening.device),)


def shares_of_loss(
    teacher: Teacher,
    masks: Mapping[str, Bool[Tensor, "_out _in"]],
    groups: Sequence[FusedLinears],
    batches: Sequence[Batch],
    memory: MemorySettings,
) -> Float[Tensor, " groups"]:
    """
    The part of the loss that each group's masks are to blame for.

    All masks open together, from pruned to dense, and what the loss falls by as one of them
    opens is its share: the path integral of the gradient (Sundararajan, Taly and Yan, ICML
    2017, https://arxiv.org/abs/1703.01365), by the midpoint rule. The shares add up to the
    loss under all masks minus the dense model's. However many groups there are, ``POINTS``
    passes forward and backward over the data tell all of them.

    :param masks: by linear, channels in their old places
    :param batches: of validation data
    :return: on the CPU, in the unit of the loss
    :raises ValueError: if a loss is not finite
    """
    model = teacher.model
    first = next(model.parameters())
    openings = [torch.zeros((), device=first.device) for _ in groups]
    for opening in openings:
        opening.requires_grad_()
    half_open = {
        name: HalfOpenMask(masks[name], opening, first.dtype)
        for group, opening in zip(groups, openings, strict=True)
        for name in group.linears
    }
    backward = Backward(
        teacher, lambda: half_open, openings, batches, memory, use_graph=False
    )
    bar = ranks.bar(desc="Measuring sensitivity", total=POINTS * len(batches))
    with frozen(model), torch.enable_grad():
        for point in range(POINTS):
            with torch.no_grad():
                for opening in openings:
                    opening.fill_((point + 0.5) / POINTS)
            for batch in batches:
                backward(batch)
                bar.update()
    bar.close()
    slopes = [0.0 if o.grad is None else float(o.grad) for o in openings]
    return -torch.tensor(slopes, dtype=torch.float64) / (POINTS * len(batches))
