# SPDX-License-Identifier: Apache-2.0
"""A linear under the mask of a grouping; its gradient knows what every move would do."""

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nm_permute_plugin.maths.mask_gradients import (
    RowSample,
    grouped_mask,
    insertion_costs,
    multiplied,
    rivalry,
)
from nm_permute_plugin.pruning.learn.grouping import Grouping
from nm_permute_plugin.specs.spec import Consumer


@dataclass(frozen=True)
class InsertionMask:
    """
    The N:M mask of one linear under a hard grouping, with gradients for the choice.

    Called with the input, the weight and the bias it is the masked linear. As soon as
    backward has the gradient of the weight, it becomes that of ``choice`` and of
    ``log_multiplier``: no two of these large gradients live at once.

    :param score: of the weights, one column a channel of the space
    :param choice: whose gradient is what moving each channel to each group would cost
    :param log_multiplier: of the scores, of equally long sections of the rows
    :param sample: the rows that weigh the moves
    """

    consumer: Consumer
    score: Float[Tensor, "rows channels"]
    grouping: Grouping
    choice: Float[Tensor, "blocks size groups"]
    log_multiplier: Float[Tensor, "sections blocks size"]
    sample: RowSample

    @property
    def kept(self) -> Bool[Tensor, "out in"]:
        """True where a weight is kept."""
        if self._in_triton:  # takes less time than it would take memory
            from nm_permute_plugin.maths.mask_gradients_triton import kept_in_triton

            mask = kept_in_triton(self.score, self._factors, self.grouping)
            return self.consumer.unview(mask)
        return self._kept

    @cached_property
    def _kept(self) -> Bool[Tensor, "out in"]:
        grouping = self.grouping
        blocks = grouped_mask(self._scaled(), grouping.column, grouping.pattern)
        return self.consumer.unview(blocks.flatten(1)[:, grouping.back])

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x (W * mask)^T + b``."""
        out: Tensor = _InsertionLinear.apply(
            x, weight, bias, self.choice, self.log_multiplier, self
        )
        return out

    def moves(
        self, grad: Float[Tensor, "out in"], choice: bool, multipliers: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """
        What the gradient of the mask is for ``choice`` and for ``log_multiplier``.

        :param grad: of the loss with respect to the mask
        :param choice: False leaves the first out
        :param multipliers: False leaves the second out
        :return: ``insertion_costs`` over the sample of rows, and ``rivalry``, summed over
            the rows of a section
        """
        grouping, pattern = self.grouping, self.grouping.pattern
        grad = self.consumer.view(grad)
        if self._in_triton:
            from nm_permute_plugin.maths.mask_gradients_triton import moves_in_triton

            return moves_in_triton(
                self.score,
                self._factors,
                grad,
                grouping,
                self.sample,
                choice,
                multipliers,
            )
        column = grouping.column
        blocks = grouping.blocks(grad)
        scaled = self._scaled()
        costs = of_multiplier = None
        if multipliers:
            of_score = rivalry(scaled, blocks, column, pattern)
            of_multiplier = of_score.unflatten(0, (len(self.log_multiplier), -1)).sum(1)
        if choice:
            rows = slice(self.sample.offset, None, self.sample.stride)
            costs = insertion_costs(scaled[rows], blocks[rows], column, pattern)
        return costs, of_multiplier

    @property
    def _in_triton(self) -> bool:
        return self.score.is_cuda and find_spec("triton") is not None

    @cached_property
    def _factors(self) -> Float[Tensor, "sections channels"]:
        return self.log_multiplier.detach().exp().flatten(1)

    def _scaled(self) -> Float[Tensor, "rows blocks size"]:
        scores = self.grouping.blocks(self.score)
        return multiplied(scores, self.log_multiplier.detach())


class _InsertionLinear(torch.autograd.Function):
    """The masked weight is made anew in backward, never stored."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        choice: Tensor,
        log_multiplier: Tensor,
        mask: InsertionMask,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mask = mask
        return torch.nn.functional.linear(x, weight * mask.kept, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = costs = of_multiplier = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (weight * ctx.mask.kept)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            of_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
            of_mask = of_weight.mul_(weight)
            costs, of_multiplier = ctx.mask.moves(of_mask, *ctx.needs_input_grad[3:5])
        return grad_x, None, None, costs, of_multiplier, None
