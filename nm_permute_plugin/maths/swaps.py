# SPDX-License-Identifier: Apache-2.0
"""Swaps of two channels, by what moving each of them to the other's group would cost."""

from jaxtyping import Float, Int
from torch import Tensor


def swap_gains(
    costs: Float[Tensor, "blocks size groups"], column: Int[Tensor, "blocks size"]
) -> Float[Tensor, "blocks size size"]:
    """
    How much the loss should fall, to first order, when two channels change places.

    :param costs: the change of the loss when a channel joins a group, relative to its
        being in none (``insertion_costs``)
    :param column: the group of each channel

    >>> from torch import tensor
    >>> swap_gains(tensor([[[2.0, 1.0], [0.0, 3.0]]]), tensor([[0, 1]]))
    tensor([[[0., 4.],
             [4., 0.]]])
    """
    blocks, size, _ = costs.shape
    joined = costs.gather(2, column[:, None, :].expand(blocks, size, size))
    own = joined.diagonal(dim1=1, dim2=2)
    gains = own[:, :, None] + own[:, None, :] - joined - joined.transpose(1, 2)
    return gains.masked_fill(column[:, :, None] == column[:, None, :], 0)


def swap(
    costs: Float[Tensor, "blocks size groups"],
    column: Int[Tensor, "blocks size"],
    most: int,
) -> None:
    """
    Swap two channels of a block, in place, in the blocks where the loss should fall most.

    One swap a block: a second would rest on costs that the first has changed. What was
    known of the moves of channels that were swapped is forgotten.

    :param most: swaps, at least one
    """
    size = column.shape[1]
    best, pair = swap_gains(costs, column).flatten(1).max(1)
    top = best.topk(min(max(1, most), len(best)))
    blocks = top.indices[top.values > 0]
    first, second = pair[blocks] // size, pair[blocks] % size
    of_first, of_second = column[blocks, first], column[blocks, second]
    column[blocks, first], column[blocks, second] = of_second, of_first
    costs[blocks, first] = 0
    costs[blocks, second] = 0
