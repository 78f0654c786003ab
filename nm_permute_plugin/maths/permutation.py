# SPDX-License-Identifier: Apache-2.0
"""Permutations as index vectors: ``new[j] = old[perm[j]]``."""

import torch
from einops import rearrange, repeat
from jaxtyping import Int
from torch import Tensor

Permutation = Int[Tensor, " channels"]


def check_permutation(perm: Permutation, name: str = "perm") -> None:
    """
    Refuse an index vector that does not name every channel exactly once.

    :param name: what the error calls it
    :raises ValueError: with the first channel that is missing
    """
    missing = torch.ones(len(perm), dtype=torch.bool, device=perm.device)
    inside = (perm >= 0) & (perm < len(perm))
    missing[perm[inside]] = False
    if bool(missing.any()):
        raise ValueError(
            f"{name} is no permutation of {len(perm)} channels: channel "
            f"{int(missing.nonzero()[0])} is missing"
        )


def invert(perm: Permutation) -> Permutation:
    """
    The permutation that undoes ``perm``.

    >>> invert(torch.tensor([2, 0, 1]))
    tensor([1, 2, 0])
    """
    return torch.argsort(perm)


def is_identity(perm: Permutation) -> bool:
    """Whether every channel stays where it is."""
    return torch.equal(perm.cpu(), torch.arange(len(perm)))


def compose(first: Permutation, second: Permutation) -> Permutation:
    """
    The one permutation that equals ``first``, then ``second``.

    >>> compose(torch.tensor([2, 0, 1]), torch.tensor([1, 0, 2]))
    tensor([0, 2, 1])
    """
    return first[second]


def from_blocks(blocks: Int[Tensor, "blocks size"]) -> Permutation:
    """
    Permutations inside consecutive blocks, as one permutation of all channels.

    >>> from_blocks(torch.tensor([[1, 0], [0, 1]]))
    tensor([1, 0, 2, 3])
    """
    count, size = blocks.shape
    starts = torch.arange(count, device=blocks.device)[:, None] * size
    return rearrange(blocks + starts, "blocks size -> (blocks size)")


def expand_heads(
    perm: Permutation, head_dim: int, queries: int
) -> Int[Tensor, " expanded"]:
    """
    Follow an order inside key/value heads across the query heads that share them.

    :param perm: an order of ``kv_heads * head_dim`` channels that leaves no head
    :param head_dim: channels of one head
    :param queries: query heads per key/value head
    :return: the order of ``kv_heads * queries * head_dim`` channels
    :raises ValueError: if ``perm`` moves a channel out of its head

    >>> expand_heads(torch.tensor([1, 0, 2, 3]), head_dim=2, queries=2)
    tensor([1, 0, 3, 2, 4, 5, 6, 7])
    """
    inside = rearrange(perm, "(head dim) -> head dim", dim=head_dim)
    heads = torch.arange(len(inside), device=perm.device)[:, None]
    inside = inside - heads * head_dim
    if bool(((inside < 0) | (inside >= head_dim)).any()):
        raise ValueError(
            f"the permutation moves a channel out of its head of {head_dim} channels"
        )
    return from_blocks(
        repeat(inside, "head dim -> (head queries) dim", queries=queries)
    )
