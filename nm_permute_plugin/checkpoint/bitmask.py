# SPDX-License-Identifier: Apache-2.0
"""Convert weights of any sparsity to ``sparse-bitmask`` tensors and back, bit by bit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from nm_permute_plugin.checkpoint.codec import nonzero_bits
from nm_permute_plugin.checkpoint.layout24 import WORDS


@dataclass(frozen=True)
class SparseBitmask:
    """
    Holds a sparse weight as it is stored on disk, for 4:8 and other patterns.

    :param compressed: the non-zeros, row after row
    :param bitmask: uint8 [out, ceil(in / 8)], a bit for every weight, the lowest first
    :param row_offsets: int64 [out], where each row begins in ``compressed``
    :param shape: int64 [2], that of the dense weight
    """

    compressed: Tensor
    bitmask: Tensor
    row_offsets: Tensor
    shape: Tensor


def compress_any(weight: Tensor, name: str = "weight") -> SparseBitmask:
    """
    Compresses a weight; ``decompress_any`` gives back the same bits.

    A weight counts as zero when all its bits are.

    :param name: what messages call it
    :raises ValueError: if its shape or dtype cannot be stored

    >>> stored = compress_any(torch.tensor([[0.0, 5.0], [6.0, 0.0]]))
    >>> stored.compressed, stored.bitmask.tolist(), stored.row_offsets
    (tensor([5., 6.]), [[2], [1]], tensor([0, 1]))
    """
    if weight.dtype not in WORDS or weight.dim() != 2:
        raise ValueError(
            f"{name} is {weight.dtype} {tuple(weight.shape)}; stored are [out, in] of "
            f"{', '.join(str(dtype) for dtype in WORDS)}. Leave it dense."
        )
    words = weight.detach().contiguous().view(WORDS[weight.dtype])
    flags = nonzero_bits(weight)
    counts = flags.sum(-1)
    return SparseBitmask(
        compressed=words[flags].view(weight.dtype),
        bitmask=pack_bits(flags),
        row_offsets=counts.cumsum(0) - counts,
        shape=torch.tensor(list(weight.shape), device=weight.device),
    )


def decompress_any(
    compressed: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor,
    shape: Tensor | Sequence[int],
    name: str = "weight",
) -> Tensor:
    """
    Makes the dense weight of stored tensors; weights not stored become +0.0.

    :param name: what messages call it
    :raises ValueError: if the tensors do not belong together

    >>> bits = torch.tensor([[2], [1]], dtype=torch.uint8)
    >>> decompress_any(torch.tensor([5.0, 6.0]), bits, torch.tensor([0, 1]), (2, 2))
    tensor([[0., 5.],
            [6., 0.]])
    """
    sizes = shape.flatten().tolist() if isinstance(shape, Tensor) else list(shape)
    fits = compressed.dtype in WORDS and bitmask.dtype == torch.uint8
    if not fits or len(sizes) != 2 or min(sizes) < 0:
        raise ValueError(
            f"{name}: compressed is {compressed.dtype}, bitmask {bitmask.dtype}, shape "
            f"{sizes}. The checkpoint is damaged, or not of this format."
        )
    rows, columns = (int(size) for size in sizes)
    if tuple(bitmask.shape) != (rows, -(-columns // 8)) or compressed.dim() != 1:
        raise ValueError(
            f"{name}: shape says {sizes}, bitmask is {tuple(bitmask.shape)} and "
            f"compressed {tuple(compressed.shape)}. The checkpoint is damaged."
        )
    bits = unpack_bits(bitmask)
    flags = bits[:, :columns]
    counts = flags.sum(-1)
    starts = counts.cumsum(0) - counts
    if bool(bits[:, columns:].any()) or not torch.equal(starts, row_offsets.flatten()):
        raise ValueError(
            f"{name}: its bitmask has bits beyond its {columns} channels, or disagrees "
            "with row_offsets. The checkpoint is damaged."
        )
    if int(counts.sum()) != len(compressed):
        raise ValueError(
            f"{name}: its bitmask has {int(counts.sum())} bits for {len(compressed)} "
            "stored weights. The checkpoint is damaged."
        )
    values = compressed.detach().contiguous().view(WORDS[compressed.dtype])
    words = values.new_zeros(rows, columns)
    words[flags] = values
    return words.view(compressed.dtype)


def pack_bits(flags: Bool[Tensor, "rows bits"]) -> UInt8[Tensor, "rows bytes"]:
    """Packs eight flags into a byte, the first into its lowest bit, row by row."""
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[1] % 8))
    weights = 1 << torch.arange(8, device=flags.device, dtype=torch.uint8)
    octets = padded.view(len(flags), padded.shape[1] // 8, 8)
    return (octets * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, "rows bytes"]) -> Bool[Tensor, "rows bits"]:
    """Gives back the flags that ``pack_bits`` packed, filled up to whole bytes."""
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    bits = (packed.unsqueeze(-1) >> places & 1).bool()
    return bits.view(len(packed), 8 * packed.shape[1])
