# SPDX-License-Identifier: Apache-2.0
"""Entropy-regularised matching: from logits to a soft assignment, with annealing."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def sinkhorn(
    logits: Float[Tensor, "*blocks rows columns"],
    temperature: float = 1.0,
    iterations: int = 10,
) -> Float[Tensor, "*blocks rows columns"]:
    """
    The soft assignment of rows to columns, ``diag(u) exp(logits / temperature) diag(v)``.

    Rows sum to 1 and columns to ``rows / columns``: doubly stochastic where the two are
    equal, an assignment to groups of equal capacity where they are not. Computed in the
    log domain (Cuturi, https://arxiv.org/abs/1306.0895; Mena et al.,
    https://arxiv.org/abs/1802.08665, eq. 4), ending on the columns.

    :param logits: the benefit of each assignment (minus the cost)
    :param temperature: the entropy's weight; small is nearly hard
    :param iterations: pairs of row and column normalisations
    :raises ValueError: if the temperature is not positive or ``iterations`` below 1

    >>> sinkhorn(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    if temperature <= 0 or iterations < 1:
        raise ValueError(
            f"sinkhorn needs temperature > 0 and iterations >= 1, got {temperature} "
            f"and {iterations}"
        )
    rows, columns = logits.shape[-2:]
    capacity = math.log(rows / columns)
    log_soft = logits / temperature
    for _ in range(iterations):
        log_soft = log_soft - torch.logsumexp(log_soft, dim=-1, keepdim=True)
        log_soft = log_soft - torch.logsumexp(log_soft, dim=-2, keepdim=True) + capacity
    return log_soft.exp()


def annealed(step: int, steps: int, start: float, end: float) -> float:
    """
    The temperature at ``step``: geometric from ``start`` to ``end`` at the last step.

    >>> [round(annealed(step, 3, 1.0, 0.01), 3) for step in range(3)]
    [1.0, 0.1, 0.01]
    """
    if steps < 2:
        return end
    return start * math.pow(end / start, step / (steps - 1))
