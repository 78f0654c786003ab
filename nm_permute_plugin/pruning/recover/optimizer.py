# SPDX-License-Identifier: Apache-2.0
"""AdamW for weights of every scale, with warm-up and linear decay."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nm_permute_plugin.pruning import ranks

FIRST, SECOND, SMALL = 0.9, 0.999, 1e-8
"""AdamW's decays of the mean gradient and of the mean square, and what keeps a divisor
from 0."""

ELEMENTS = 1 << 26
"""Weights updated at a time; more of them do not make a GPU any faster."""


class RelativeAdamW:
    """
    AdamW (https://arxiv.org/abs/1711.05101) without weight decay, whose steps are relative
    to the size of what they change.

    A step moves a weight by about ``rate`` times the root mean square of its parameter's
    kept weights, so that one rate serves models of every scale. The rate rises over the
    first tenth of the steps, because AdamW knows no gradient yet, and then falls to 0, both
    linearly. PyTorch's own launches every operation anew for each rate, here for each
    parameter, which takes a GPU as long as half of the rest of a small model's step.

    :param masters: float32 parameters, by name
    :param steps: after which the rate has fallen to 0
    """

    def __init__(self, masters: Mapping[str, Tensor], rate: float, steps: int) -> None:
        self._masters = list(masters.values())
        self._sizes = [_root_mean_square(master) for master in self._masters]
        self._means = [torch.zeros_like(m.detach()) for m in self._masters]
        self._squares = [torch.zeros_like(m.detach()) for m in self._masters]
        self._in_shards = any(isinstance(m, DTensor) for m in self._masters)
        self._counts = [0] * len(self._masters)
        self._rate, self._steps, self._done = rate, steps, 0

    @property
    def rate(self) -> float:
        """How far the next step moves a weight, relative to the size of its parameter."""
        warm_up = self._steps // 10
        rises = (self._done + 1) / (warm_up + 1)
        return self._rate * min(rises, self._left / (self._steps - warm_up))

    @property
    def _left(self) -> int:
        return self._steps - self._done

    @torch.no_grad()
    def step(self) -> None:
        """Take one step along the gradients, and zero them in place."""
        rate = self.rate
        for part in self._parts():
            masters, means, squares = (
                [values[i] for i in part]
                for values in (self._masters, self._means, self._squares)
            )
            grads = [grad for m in masters if (grad := m.grad) is not None]
            torch._foreach_lerp_(means, grads, 1 - FIRST)
            torch._foreach_mul_(squares, SECOND)
            torch._foreach_addcmul_(squares, grads, grads, 1 - SECOND)
            # Corrections of the bias, as the averages begin at 0.
            of_means, of_squares = self._corrections(part)
            divisors = torch._foreach_sqrt(squares)
            torch._foreach_add_(divisors, [SMALL * root for root in of_squares])
            lengths = [
                -rate * self._sizes[i] * root / mean
                for i, mean, root in zip(part, of_means, of_squares, strict=True)
            ]
            torch._foreach_addcdiv_(masters, means, divisors, lengths)
            if self._in_shards:
                for master in masters:
                    master.grad = None
            else:
                torch._foreach_zero_(grads)
        self._done += 1

    def _corrections(self, part: list[int]) -> tuple[list[float], list[float]]:
        """Of the means and of the roots of the squares, for one more step of each."""
        for i in part:
            self._counts[i] += 1
        return (
            [1 - FIRST ** self._counts[i] for i in part],
            [math.sqrt(1 - SECOND ** self._counts[i]) for i in part],
        )

    def _parts(self) -> Iterator[list[int]]:
        """The numbers of the parameters with gradients, a limited size at a time."""
        part: list[int] = []
        size = 0
        for index, master in enumerate(self._masters):
            if master.grad is None:
                continue
            if part and size + master.numel() > ELEMENTS:
                yield part
                part, size = [], 0
            part.append(index)
            size += master.numel()
        if part:
            yield part

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` goes on from."""
        return {
            "done": self._done,
            "counts": list(self._counts),
            "means": self._means,
            "squares": self._squares,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an optimizer of the same parameters and steps."""
        self._done, self._counts = int(state["done"]), list(state["counts"])
        for own, kept in ((self._means, "means"), (self._squares, "squares")):
            for tensor, value in zip(own, state[kept], strict=True):
                tensor.copy_(value)


def _root_mean_square(master: Tensor) -> float:
    """The root mean square of the values that are not 0; 0 if there are none."""
    values = master.detach()
    if isinstance(values, DTensor):
        shard: Tensor = values.to_local()
        squares = ranks.total(float(shard.double().square().sum()))
        count = round(ranks.total(float((shard != 0).sum())))
        return float((squares / max(count, 1)) ** 0.5)
    count = int((values != 0).sum())
    return float(values.norm()) / float(max(count, 1) ** 0.5)
