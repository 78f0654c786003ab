# SPDX-License-Identifier: Apache-2.0
"""Write permutations into a model's weights, so that nothing is permuted at run time."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nm_permute_plugin.maths.permutation import Permutation, check_permutation, invert
from nm_permute_plugin.specs.moving import moved
from nm_permute_plugin.specs.spec import ResolvedSpec, Space

Write = Callable[[nn.Module, str, Tensor], None]
"""``write(owner, name, tensor)`` stores a parameter's new value, where gradients are off.
Offloaded modules need their host's own way."""


def write_in_place(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Overwrite a parameter that lives in its module; tied names see the change."""
    getattr(owner, name).copy_(tensor)


@torch.no_grad()
def fold(
    model: nn.Module,
    resolved: ResolvedSpec,
    perms: Mapping[str, Permutation],
    write: Write = write_in_place,
) -> None:
    """
    Reorder every parameter by the permutations of the spaces its axes name.

    The model computes the same function. A tied parameter is moved once; spaces without
    a permutation stay as they are. ``fold`` with ``invert_all(perms)`` is the inverse,
    bit for bit.

    :param perms: by space, ``new[j] = old[perm[j]]``
    :param write: how a new value is stored
    :raises ValueError: for an unknown space, or an index vector that is no permutation
        of the space, or one that leaves its segment; nothing has been written then
    """
    check_perms(resolved, perms)
    for parameter in resolved.parameters:
        if not parameter.spaces & perms.keys():
            continue
        owner_name, _, leaf = parameter.names[0].rpartition(".")
        owner = model.get_submodule(owner_name)
        old = getattr(owner, leaf).detach()
        new = [
            moved(matrix, axes, resolved, perms)
            for matrix, axes in zip(
                old if parameter.packed else [old], parameter.matrices, strict=True
            )
        ]
        write(owner, leaf, torch.stack(new) if parameter.packed else new[0])


def check_perms(resolved: ResolvedSpec, perms: Mapping[str, Permutation]) -> None:
    """
    Refuse permutations that cannot be folded.

    :raises ValueError: as ``fold``
    """
    for name, perm in perms.items():
        if name not in resolved.spaces:
            raise ValueError(
                f"the model has no space {name!r}; it has {', '.join(resolved.spaces)}"
            )
        _check(perm, resolved.spaces[name])


def invert_all(perms: Mapping[str, Permutation]) -> dict[str, Permutation]:
    """The permutations that undo ``perms``."""
    return {name: invert(perm) for name, perm in perms.items()}


def _check(perm: Permutation, space: Space) -> None:
    if len(perm) != space.size:
        raise ValueError(
            f"space {space.name} has {space.size} channels, its permutation {len(perm)}"
        )
    check_permutation(perm, f"the permutation of space {space.name}")
    old = torch.arange(space.size, device=perm.device)
    if not torch.equal(perm // space.segment, old // space.segment):
        raise ValueError(
            f"the permutation of space {space.name} moves a channel out of its segment of "
            f"{space.segment}: attention heads keep their own channels"
        )
