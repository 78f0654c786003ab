# SPDX-License-Identifier: Apache-2.0
"""Swaps of two channels, by the cost of moving each of them to the other's group."""

from jaxtyping import Float, Int
from torch import Tensor


def swap_gains(
    costs: Float[Tensor, "blocks size groups"], group_of: Int[Tensor, "blocks size"]
) -> Float[Tensor, "blocks size size"]:
    """
    How much the loss should fall, to first order, when two channels change places.

    :param costs: the change of the loss when a channel joins a group, relative to its
        being in none (``move_costs``)
    :param group_of: the group of each channel

    >>> from torch import tensor
    >>> swap_gains(tensor([[[2.0, 1.0], [0.0, 3.0]]]), tensor([[0, 1]]))
    tensor([[[0., 4.],
             [4., 0.]]])
    """
    blocks, size, _ = costs.shape
    joined = costs.gather(2, group_of[:, None, :].expand(blocks, size, size))
    own = joined.diagonal(dim1=1, dim2=2)
    gains = own[:, :, None] + own[:, None, :] - joined - joined.transpose(1, 2)
    return gains.masked_fill(group_of[:, :, None] == group_of[:, None, :], 0)


def swap(
    costs: Float[Tensor, "blocks size groups"],
    group_of: Int[Tensor, "blocks size"],
    most: int,
) -> None:
    """
    Swap two channels of a block, in place, in the blocks where the loss should fall most.

    One swap a block is made: a second would rest on costs that the first has changed. The
    costs of channels that were swapped are zeroed.

    :param most: swaps at most; one is always tried
    """
    size = group_of.shape[1]
    best, pair = swap_gains(costs, group_of).flatten(1).max(1)
    top = best.topk(min(max(1, most), len(best)))
    blocks = top.indices[top.values > 0]
    first, second = pair[blocks] // size, pair[blocks] % size
    of_first, of_second = group_of[blocks, first], group_of[blocks, second]
    group_of[blocks, first], group_of[blocks, second] = of_second, of_first
    costs[blocks, first] = 0
    costs[blocks, second] = 0
