# SPDX-License-Identifier: Apache-2.0
"""Write permutations into a model's weights, so that nothing is permuted at run time."""

from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from nm_permute_plugin.maths.permutation import (
    Permutation,
    check_permutation,
    expand_heads,
    invert,
)
from nm_permute_plugin.specs.conv1d import as_stored
from nm_permute_plugin.specs.grammar import Axis, Part
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
            _moved(matrix, axes, resolved, perms)
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


def moved_axis(
    tensor: Shaped[Tensor, "..."],
    dim: int,
    axis: Axis,
    resolved: ResolvedSpec,
    perms: Mapping[str, Permutation],
) -> Shaped[Tensor, "..."]:
    """
    One axis of a tensor, moved as the axis of a parameter is.

    :param perms: as for ``fold``
    """
    if not any(part.space in perms for part in axis):
        return tensor
    runs = [_index(part, resolved, perms) for part in axis]
    starts = accumulate((part.length for part in axis[:-1]), initial=0)
    index = torch.cat([run + start for run, start in zip(runs, starts, strict=True)])
    if axis[0].interleaved:
        index = _interleaved(index, axis, resolved)
    return tensor.index_select(dim, index.to(tensor.device))


def moved_along(
    model: nn.Module,
    resolved: ResolvedSpec,
    matrices: Mapping[str, Shaped[Tensor, "_out _in"]],
    perms: Mapping[str, Permutation],
) -> dict[str, Shaped[Tensor, "_out _in"]]:
    """
    Matrices that belong to the weights of linears, masks for instance, moved as they are.

    :param matrices: by linear, [out, in] however the weight is stored
    :param perms: as for ``fold``
    """
    moved = dict(matrices)
    for parameter in resolved.parameters:
        for name in parameter.names:
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight" and owner in matrices:
                module = model.get_submodule(owner)
                stored = as_stored(module, matrices[owner])
                new = _moved(stored, parameter.matrices[0], resolved, perms)
                moved[owner] = as_stored(module, new)
    return moved


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
            f"the permutation of space {space.name} moves a channel out of its run of "
            f"{space.segment}: attention heads keep their own channels"
        )


def _moved(
    tensor: Shaped[Tensor, "..."],
    axes: tuple[Axis, ...],
    resolved: ResolvedSpec,
    perms: Mapping[str, Permutation],
) -> Shaped[Tensor, "..."]:
    for dim, axis in enumerate(axes):
        tensor = moved_axis(tensor, dim, axis, resolved, perms)
    return tensor


def _interleaved(
    index: Int[Tensor, " channels"], axis: Axis, resolved: ResolvedSpec
) -> Int[Tensor, " channels"]:
    """Turn the order of parts one after another to that of parts that take turns."""
    space = resolved.spaces[next(part.space for part in axis if part.space is not None)]
    count = space.size // space.segment
    shares = [part.length // count for part in axis]
    heads = torch.arange(len(index)).view(count, -1).split(shares, dim=1)
    stored = torch.cat([share.flatten() for share in heads])
    out = torch.empty_like(index)
    out[stored] = stored[index]
    return out


def _index(
    part: Part, resolved: ResolvedSpec, perms: Mapping[str, Permutation]
) -> Int[Tensor, " run"]:
    """The order of a part's channels, from 0 on."""
    if part.space is None or part.space not in perms:
        return torch.arange(part.length)
    perm, space = perms[part.space].cpu(), resolved.spaces[part.space]
    if not part.heads:
        return perm
    return expand_heads(perm, space.segment, part.length // space.size)
