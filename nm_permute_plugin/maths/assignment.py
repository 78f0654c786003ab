# SPDX-License-Identifier: Apache-2.0
"""Hard assignments: the best one-to-one matching of a matrix of benefits."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign(
    benefit: Float[Tensor, "blocks rows columns"],
) -> Int[Tensor, "blocks rows"]:
    """
    The column of each row, so that the sum of the benefits is the largest there is.

    Each column takes ``rows / columns`` rows: one, where the matrix is square.
    Solved exactly, block by block (``scipy.optimize.linear_sum_assignment``).

    :raises ValueError: if the columns cannot share the rows evenly, or a value is NaN

    >>> assign(torch.tensor([[[1.0, 2.0], [1.0, 5.0]]]))
    tensor([[0, 1]])
    """
    blocks, rows, columns = benefit.shape
    if rows % columns:
        raise ValueError(f"{rows} rows cannot be shared evenly by {columns} columns")
    if bool(benefit.isnan().any()):
        raise ValueError("the benefits to assign by hold NaN")
    capacity = rows // columns
    matrices = benefit.detach().float().cpu().numpy().repeat(capacity, axis=-1)
    chosen = np.empty(matrices.shape[:2], dtype=np.int64)

    def solve(part: slice) -> None:
        for block in range(blocks)[part]:
            chosen[block] = linear_sum_assignment(matrices[block], maximize=True)[1]

    # SciPy leaves Python's lock free: threads share the blocks.
    threads = min(blocks, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(solve, [slice(first, None, threads) for first in range(threads)]))
    return torch.from_numpy(chosen).to(benefit.device) // capacity


def order_by(column: Int[Tensor, "blocks rows"]) -> Int[Tensor, "blocks rows"]:
    """
    The rows in the order of their columns: a permutation inside each block.

    >>> order_by(torch.tensor([[1, 0, 1, 0]]))
    tensor([[1, 3, 0, 2]])
    """
    return torch.argsort(column, dim=-1, stable=True)
