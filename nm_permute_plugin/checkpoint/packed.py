# SPDX-License-Identifier: Apache-2.0
"""Unpack quantized levels of less than 8 bits, to see which weights are zero."""

import torch
from jaxtyping import Int, Int8
from torch import Tensor

from nm_permute_plugin.checkpoint.config import weight_schemes
from nm_permute_plugin.checkpoint.directory import Checkpoint
from nm_permute_plugin.checkpoint.shards import DamagedError

PACKED = ".weight_packed"
_ROWS = 256  # unpacked at a time: their elements are 64 bits wide meanwhile


def packed_modules(checkpoint: Checkpoint) -> list[str]:
    """Lists the modules whose weight is packed, in the order of the files."""
    return [
        name.removesuffix(PACKED) for name in checkpoint.where if name.endswith(PACKED)
    ]


def packed_levels(checkpoint: Checkpoint, module: str) -> Int8[Tensor, "out in"]:
    """
    Reads the levels of a packed weight, and returns 0 exactly where the weight is zero.

    :raises DamagedError: if its tensors do not belong together
    :raises NotImplementedError: for a packing that is not known
    """
    name = f"{module}{PACKED}"
    packed = checkpoint.read(name)
    if packed.dtype == torch.uint8 and packed.dim() == 2:
        # two 4-bit floats a byte; but for the sign, all bits of a zero are 0
        nibbles = torch.stack([packed & 7, packed >> 4 & 7], -1)
        return nibbles.flatten(1).to(torch.int8)
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise NotImplementedError(
            f"{checkpoint.where[name].path}: {name} is {packed.dtype} "
            f"{list(packed.shape)}; known are int32 and uint8 matrices"
        )
    rows, columns = _shape(checkpoint, module, packed)
    bits = _bits(checkpoint, name, packed.shape[1], columns)
    levels = unpack(packed, bits, columns)
    if f"{module}.weight_zero_point" not in checkpoint.where:
        return levels
    points = checkpoint.read(f"{module}.weight_zero_point")
    zeros = unpack(points.t().contiguous(), bits, rows).t()
    if f"{module}.weight_g_idx" in checkpoint.where:
        group = checkpoint.read(f"{module}.weight_g_idx").long()
        return (levels != zeros[:, group]).to(torch.int8)
    return (levels != of_groups(zeros, columns)).to(torch.int8)


def of_groups(zeros: Tensor, columns: int) -> Tensor:
    """
    Spreads the zero points of equal groups of channels over all channels.

    >>> of_groups(torch.tensor([[1, 2]]), columns=4)
    tensor([[1, 1, 2, 2]])
    """
    return zeros[:, torch.arange(columns) * zeros.shape[1] // columns]


def unpack(
    packed: Int[Tensor, "rows words"], bits: int, columns: int
) -> Int8[Tensor, "rows columns"]:
    """
    Unpacks the levels of rows that are packed without gaps, the lowest bits first.

    >>> unpack(torch.tensor([[0x9A8]], dtype=torch.int32), bits=4, columns=3)
    tensor([[0, 2, 1]], dtype=torch.int8)
    """
    start = torch.arange(columns) * bits
    word, offset = start // 32, start % 32
    parts = []
    for part in packed.split(_ROWS):
        low = torch.nn.functional.pad(part.long() & 0xFFFFFFFF, (0, 1))
        both = low[:, word] | low[:, word + 1] << 32
        level = both >> offset & (1 << bits) - 1
        parts.append((level - (1 << bits - 1)).to(torch.int8))
    return torch.cat(parts) if parts else packed.new_zeros(0, columns).to(torch.int8)


def _shape(checkpoint: Checkpoint, module: str, packed: Tensor) -> tuple[int, int]:
    name = f"{module}.weight_shape"
    if name not in checkpoint.where:
        file = checkpoint.where[f"{module}{PACKED}"].path
        raise DamagedError(file, f"has {module}{PACKED}, but no {name}", name)
    sizes = checkpoint.read(name).flatten().tolist()
    if len(sizes) != 2 or sizes[0] != len(packed):
        raise DamagedError(
            checkpoint.where[name].path,
            f"{name} says {sizes}, {module}{PACKED} is {list(packed.shape)}",
            name,
        )
    return int(sizes[0]), int(sizes[1])


def _bits(checkpoint: Checkpoint, name: str, words: int, columns: int) -> int:
    """Finds the width of a level: config.json names it, and it fits the words."""
    found = [weights.get("num_bits") for weights in weight_schemes(checkpoint.config)]
    widths = {bits for bits in found if isinstance(bits, int) and bits > 0}
    fitting = [bits for bits in sorted(widths) if -(-columns * bits // 32) == words]
    if not fitting:
        raise DamagedError(
            checkpoint.where[name].path,
            f"{name} has {words} words for {columns} channels, which fits none of the "
            f"widths that config.json names: {sorted(widths)} bits",
            name,
        )
    return fitting[0]
