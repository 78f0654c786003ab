# SPDX-License-Identifier: Apache-2.0
"""Every parameter of a model is matched with the one line of the spec that claims it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nm_permute_plugin.specs.grammar import Axis, Lines


@dataclass(frozen=True)
class MovedParameter:
    """
    A parameter, or a buffer that the spec names, with its axes.

    :param names: all names of one tensor; there are several where it is tied
    :param shape: the tensor's, or that of one matrix where ``packed``
    :param matrices: the axes of the tensor, or of each matrix of a packed stack
    :param packed: whether the tensor's first axis numbers matrices
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    matrices: tuple[tuple[Axis, ...], ...]
    packed: bool = False

    @property
    def spaces(self) -> set[str]:
        """The names of the spaces that move it."""
        parts = (part for axes in self.matrices for axis in axes for part in axis)
        return {part.space for part in parts if part.space is not None}


def claim(
    model: nn.Module, spec: Mapping[str, str], with_values: bool = True
) -> list[MovedParameter]:
    """
    Give every parameter its line; parameters that share storage stay together.

    :param with_values: refuse parameters without values
    :raises ValueError: if a parameter has no line or two, a line fits no parameter, tied
        parameters move differently, or weights are quantized or have no values
    """
    lines = Lines(spec)
    names: dict[int, list[str]] = defaultdict(list)
    tensors: dict[int, Tensor] = {}
    for name, tensor in _tensors(model, lines, with_values):
        names[_identity(tensor)].append(name)
        tensors[_identity(tensor)] = tensor
    claims = []
    for key, aliases in names.items():
        found = {alias: _claim(alias, tensors[key], lines) for alias in aliases}
        first, *others = found.values()
        for other in others:
            if other.matrices != first.matrices:
                raise ValueError(
                    f"tied parameters {', '.join(found)} move differently in the spec; "
                    "one tensor can have one permutation only"
                )
        claims.append(replace(first, names=tuple(aliases)))
    lines.refuse_unused()
    return claims


def _claim(name: str, tensor: Tensor, lines: Lines) -> MovedParameter:
    line = lines.of(name)
    shape = tuple(tensor.shape)
    if line is None:
        raise ValueError(
            f"parameter {name} {shape} is claimed by no line of the permutation spec; "
            "each parameter needs exactly one. Give a complete spec as `spec:` in the "
            "recipe."
        )
    if len(line.words) != len(shape):
        raise ValueError(
            f"parameter {name} has {len(shape)} axes {shape}, but the spec's line "
            f"{line.text!r} names {len(line.words)}: {' '.join(line.words)!r}"
        )
    if line.counter is None:
        return MovedParameter((name,), shape, (line.axes(name),))
    matrices = tuple(line.axes(name, index) for index in range(shape[0]))
    return MovedParameter((name,), shape[1:], matrices, packed=True)


def _identity(tensor: Tensor) -> int:
    """Give tied tensors the same number. Offloaded and empty tensors have no storage."""
    stored = not tensor.is_meta and tensor.numel() > 0
    return tensor.data_ptr() if stored else id(tensor)


def _tensors(
    model: nn.Module, lines: Lines, with_values: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield every name of every parameter, and of each buffer that could hold channels."""
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if not torch.is_floating_point(tensor) or tensor.dtype.itemsize == 1:
            raise ValueError(
                f"parameter {name} is {tensor.dtype}: this model is quantized already. "
                "Permute and prune the floating-point model, then quantize."
            )
        # An offloaded module keeps its parameters in a cache, not in a dict.
        owner = model.get_submodule(name.rpartition(".")[0])
        if with_values and tensor.is_meta and type(owner._parameters) is dict:
            raise ValueError(
                f"parameter {name} is on the meta device: it has no values. Load the "
                "model's weights first."
            )
        yield name, tensor
    for name, buffer in model.named_buffers():
        if lines.of(name) is not None:
            yield name, buffer
        elif _could_hold_channels(name, buffer):
            raise ValueError(
                f"buffer {name} {tuple(buffer.shape)} is claimed by no line of the "
                "permutation spec; its values would stay where they are while channels "
                "move. Give it a line, '_' for each axis that never moves."
            )


def _could_hold_channels(name: str, buffer: Tensor) -> bool:
    # Rotary frequencies belong to the rows of q and k, which never move.
    return (
        torch.is_floating_point(buffer)
        and buffer.numel() > 1
        and not name.endswith("inv_freq")
    )
