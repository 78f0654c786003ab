# SPDX-License-Identifier: Apache-2.0
"""Move the axes of a tensor: a gather, also where weights are fused or heads share."""

from collections.abc import Mapping
from itertools import accumulate

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from nm_permute_plugin.maths.permutation import Permutation, expand_heads
from nm_permute_plugin.specs.conv1d import as_stored
from nm_permute_plugin.specs.grammar import Axis, Part
from nm_permute_plugin.specs.spec import ResolvedSpec


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
    found = dict(matrices)
    for parameter in resolved.parameters:
        for name in parameter.names:
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight" and owner in matrices:
                module = model.get_submodule(owner)
                stored = as_stored(module, matrices[owner])
                new = moved(stored, parameter.matrices[0], resolved, perms)
                found[owner] = as_stored(module, new)
    return found


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


def moved(
    tensor: Shaped[Tensor, "..."],
    axes: tuple[Axis, ...],
    resolved: ResolvedSpec,
    perms: Mapping[str, Permutation],
) -> Shaped[Tensor, "..."]:
    """A matrix, each of its axes moved as ``moved_axis`` says."""
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
