# SPDX-License-Identifier: Apache-2.0
"""Hard assignments: the best one-to-one matching of a matrix of benefits."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
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
    return assign_later(benefit)()


def assign_later(
    benefit: Float[Tensor, "blocks rows columns"],
) -> Callable[[], Int[Tensor, "blocks rows"]]:
    """
    ``assign`` in the background: the benefits are copied now, the columns come on call.

    A GPU can run what it was given meanwhile.

    :raises ValueError: as ``assign``
    """
    blocks, rows, columns = benefit.shape
    if rows % columns:
        raise ValueError(f"{rows} rows cannot be shared evenly by {columns} columns")
    device, capacity = benefit.device, rows // columns
    matrices = benefit.detach().to("cpu", torch.float32, copy=True).numpy()
    if bool(np.isnan(matrices).any()):
        raise ValueError("the benefits to assign by hold NaN")
    # Where every row can have the column it likes best, that is the best there is.
    chosen = matrices.argmax(-1)
    taken = (chosen[..., None] == np.arange(columns)).sum(1)
    hard = (taken != capacity).any(-1).nonzero()[0]

    def solve(part: slice) -> None:
        for block in hard[part]:
            square = _reduced(matrices[block]).repeat(capacity, axis=-1)
            chosen[block] = linear_sum_assignment(square)[1] // capacity

    # SciPy leaves Python's lock free: threads share the blocks.
    threads = max(1, min(len(hard), os.cpu_count() or 1))
    pool = ThreadPoolExecutor(threads)
    work = [pool.submit(solve, slice(first, None, threads)) for first in range(threads)]
    pool.shutdown(wait=False)

    def result() -> Tensor:
        for done in work:
            done.result()
        columns = torch.from_numpy(chosen)
        if device.type != "cuda":
            return columns.to(device)
        # Pinned memory is copied when the GPU comes to it; the host need not wait.
        return columns.pin_memory().to(device, non_blocking=True)

    return result


def _reduced(benefit: NDArray[np.float32]) -> NDArray[np.float64]:
    """
    Costs with the same best assignment, a zero in every row and column.

    SciPy starts from no prices at all; so it starts from those of the Hungarian method's
    first step, and searches far shorter paths.
    """
    cost = -benefit.astype(np.float64)
    cost -= cost.min(1, keepdims=True)
    cost -= cost.min(0, keepdims=True)
    return cost


def order_by(column: Int[Tensor, "blocks rows"]) -> Int[Tensor, "blocks rows"]:
    """
    The rows in the order of their columns: a permutation inside each block.

    >>> order_by(torch.tensor([[1, 0, 1, 0]]))
    tensor([[1, 3, 0, 2]])
    """
    return torch.argsort(column, dim=-1, stable=True)
