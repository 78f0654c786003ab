# SPDX-License-Identifier: Apache-2.0
"""Convert 2:4 weights to ``compressed``, ``bitmask``, ``shape`` and back, bit by bit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Bool, Int, UInt8
from loguru import logger
from torch import Tensor

from nm_permute_plugin.checkpoint.layout24 import STORED, WORDS

_CPU_OCTETS = 1 << 15  # encoded at a time: they fit into a core's cache
_GPU_OCTETS = 1 << 24  # encoded at a time: they take about 1 GB of scratch

FAULTS: list[str] = []
"""How Triton failed in this process; it is not asked again."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Sparse24:
    """
    Holds a 2:4 weight as it is stored on disk.

    :param compressed: [out, in / 2], the stored weights of every row, in order
    :param bitmask: uint8 [out, ceil(in / 8)], a bit for every weight, the lowest first,
        set where the weight is stored: two of every four
    :param shape: int64 [2, 1], that of the dense weight
    """

    compressed: Tensor
    bitmask: Tensor
    shape: Tensor


def compress(weight: Tensor, name: str = "weight") -> Sparse24:
    """
    Compresses a 2:4 weight; ``decompress`` gives back the same bits.

    A weight counts as zero when all its bits are: NaN, denormals and -0.0 are stored.
    A product with a mask leaves -0.0 behind, more than a group can store;
    ``clear_negative_zeros`` makes them +0.0.

    :param weight: [out, in], ``in`` a multiple of 4
    :param name: what messages call it
    :raises ValueError: if it is not 2:4 sparse, naming row and channels, or its shape
        or dtype cannot be stored

    >>> stored = compress(torch.tensor([[0.0, 5.0, 6.0, 0.0]]))
    >>> stored.compressed, stored.bitmask
    (tensor([[5., 6.]]), tensor([[6]], dtype=torch.uint8))
    """
    if weight.dtype not in WORDS:
        raise ValueError(
            f"{name} is {weight.dtype}, which the 2:4 format does not store; convert "
            f"it to one of {', '.join(str(known) for known in WORDS)}, or leave it."
        )
    if weight.dim() != 2 or weight.shape[1] % 4:
        raise ValueError(
            f"{name} has the shape {tuple(weight.shape)}; the 2:4 format stores "
            "[out, in] with `in` a multiple of 4. Leave it dense."
        )
    rows, columns = weight.shape
    words = weight.detach().contiguous().view(WORDS[weight.dtype])
    stored = _run("compress_in_triton", _compress_in_torch, words)
    if stored is None:
        raise ValueError(_violation(weight, name))
    return Sparse24(
        compressed=stored[0].view(weight.dtype),
        bitmask=stored[1],
        shape=torch.tensor([[rows], [columns]], device=weight.device),
    )


def decompress(
    compressed: Tensor,
    bitmask: Tensor,
    shape: Tensor | Sequence[int],
    name: str = "weight",
) -> Tensor:
    """
    Makes the dense weight of stored tensors on their device; the rest becomes +0.0.

    :param name: what messages call it
    :raises ValueError: if the shapes or dtypes do not belong together, or a group of
        four does not have exactly two bits in the bitmask, naming row and channels

    >>> bits = torch.tensor([[6]], dtype=torch.uint8)
    >>> decompress(torch.tensor([[5.0, 6.0]]), bits, (1, 4))
    tensor([[0., 5., 6., 0.]])
    """
    rows, columns = check_stored(compressed, bitmask, shape, name)
    values = compressed.detach().contiguous().view(WORDS[compressed.dtype])
    given = (values, bitmask.contiguous(), columns)
    words = _run("decompress_in_triton", _decompress_in_torch, *given)
    if words is None:
        raise ValueError(_bad_population(bitmask, columns, name))
    return words.view(compressed.dtype)


def check_stored(
    compressed: Tensor,
    bitmask: Tensor,
    shape: Tensor | Sequence[int],
    name: str = "weight",
) -> tuple[int, int]:
    """
    Checks that stored tensors agree in shapes and dtypes, and returns the dense shape.

    :raises ValueError: if they do not
    """
    if compressed.dtype not in WORDS or bitmask.dtype != torch.uint8:
        raise ValueError(
            f"{name}: compressed is {compressed.dtype} and bitmask {bitmask.dtype}; "
            f"needed are one of {', '.join(str(dtype) for dtype in WORDS)}, and "
            "torch.uint8. The checkpoint is damaged, or not of this format."
        )
    if isinstance(shape, Tensor) and shape.is_floating_point():
        raise ValueError(f"{name}: shape is {shape.dtype}, it must hold whole numbers")
    sizes = shape.flatten().tolist() if isinstance(shape, Tensor) else list(shape)
    if len(sizes) != 2 or min(sizes) < 0 or sizes[1] % 4:
        raise ValueError(
            f"{name}: shape says {sizes}; a 2:4 weight is [out, in] with `in` a "
            "multiple of 4. The checkpoint is damaged."
        )
    rows, columns = int(sizes[0]), int(sizes[1])
    expected = [(rows, columns // 2), (rows, -(-columns // 8))]
    if [tuple(compressed.shape), tuple(bitmask.shape)] != expected:
        raise ValueError(
            f"{name}: shape says {sizes}, so compressed should be {expected[0]} and "
            f"bitmask {expected[1]}; they are {tuple(compressed.shape)} and "
            f"{tuple(bitmask.shape)}. The checkpoint is damaged."
        )
    return rows, columns


def clear_negative_zeros(weight: Tensor) -> Tensor:
    """
    Replaces every -0.0, which a product with a mask leaves behind, by +0.0.

    >>> clear_negative_zeros(torch.tensor([[-0.0, -1.0]]))
    tensor([[ 0., -1.]])
    """
    if not weight.is_floating_point():
        return weight
    words = weight.detach().contiguous().view(WORDS[weight.dtype])
    return words.masked_fill(words == torch.iinfo(words.dtype).min, 0).view(
        weight.dtype
    )


def nonzero_bits(weight: Tensor) -> Bool[Tensor, "*shape"]:
    """Is True where any bit of the weight is set, as in -0.0 and NaN."""
    return weight.detach().contiguous().view(WORDS[weight.dtype]) != 0


def _in_triton(words: Tensor) -> bool:
    is_there = find_spec("triton") is not None and not FAULTS
    return words.is_cuda and words.numel() > 0 and is_there


def _run(in_triton: str, in_torch: Callable[..., Result], *given: Any) -> Result:
    """Run a pass in Triton where it can, and in PyTorch elsewhere or if Triton fails."""
    if not _in_triton(given[0]):
        return in_torch(*given)
    try:
        module = import_module("nm_permute_plugin.checkpoint.codec_triton")
        return cast(Result, getattr(module, in_triton)(*given))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of its compiler, of a damaged cache: many classes
        FAULTS.append(f"{type(error).__name__}: {error}")
        logger.warning(
            f"2:4 weights are packed by PyTorch, which takes longer: Triton failed with "
            f"{FAULTS[-1]}"
        )
        return in_torch(*given)


def _compress_in_torch(
    words: Int[Tensor, "rows columns"],
) -> tuple[Int[Tensor, "rows half"], UInt8[Tensor, "rows bytes"]] | None:
    """Returns what is stored of a weight's bits, or None if it is not 2:4."""
    rows, columns = words.shape
    values = words.new_empty(rows, columns // 2)
    bitmask = words.new_empty(rows, -(-columns // 8), dtype=torch.uint8)
    if columns % 8 == 0:
        _compress_octets(words.view(-1, 8), values.view(-1, 4), bitmask.view(-1))
    else:
        padded = torch.nn.functional.pad(words, (0, 4))
        wide = words.new_empty(rows, columns // 2 + 2)
        _compress_octets(padded.view(-1, 8), wide.view(-1, 4), bitmask.view(-1))
        values.copy_(wide[:, :-2])
        bitmask[:, -1] = torch.where(bitmask[:, -1] > 0, bitmask[:, -1] & 15, 0)
    return (values, bitmask) if bool(bitmask.all()) else None


def _decompress_in_torch(
    values: Int[Tensor, "rows half"], bitmask: UInt8[Tensor, "rows bytes"], columns: int
) -> Int[Tensor, "rows columns"] | None:
    """Returns the bits of a weight, or None unless two of any four bits are set."""
    whole = _whole(bitmask, columns)
    if not bool(_tables(str(bitmask.device)).valid[whole].all()):
        return None
    if columns % 8 == 0:
        words = values.new_zeros(len(values), columns)
        _decompress_octets(values.view(-1, 4), bitmask.reshape(-1), words.view(-1, 8))
        return words
    wide = torch.nn.functional.pad(values, (0, 2))
    words = values.new_zeros(len(values), columns + 4)
    octets = whole.to(torch.uint8).view(-1)
    _decompress_octets(wide.view(-1, 4), octets, words.view(-1, 8))
    return words[:, :columns].contiguous()


@dataclass(frozen=True)
class _Tables:
    """Maps the eight bits of two groups to what is stored, where, and if it may be."""

    stored: UInt8[Tensor, "256"]
    places: Int[Tensor, "256 4"]
    valid: Bool[Tensor, "256"]


@lru_cache(maxsize=16)
def _tables(device: str) -> _Tables:
    """Makes the tables on a device, once for each device name."""
    byte = range(256)
    low, high = [STORED[b & 15] for b in byte], [STORED[b >> 4] for b in byte]
    stored = [a | b << 4 if a and b else 0 for a, b in zip(low, high, strict=True)]
    places = [[i for i in range(8) if b >> i & 1] for b in byte]
    valid = [(b & 15).bit_count() == 2 == (b >> 4).bit_count() for b in byte]
    index = [p if ok else [0, 1, 4, 5] for p, ok in zip(places, valid, strict=True)]
    return _Tables(
        stored=torch.tensor(stored, dtype=torch.uint8, device=device),
        places=torch.tensor(index, dtype=torch.int64, device=device),
        valid=torch.tensor(valid, device=device),
    )


def _compress_octets(
    words: Int[Tensor, "octets 8"],
    values: Int[Tensor, "octets 4"],
    bitmask: UInt8[Tensor, " octets"],
) -> None:
    """Fills in values and bits of every two groups; no bits where one is not 2:4."""
    tables = _tables(str(words.device))
    for part in _parts(words):
        # eight bytes of 0 or 1, multiplied so that their bits meet in the top byte; on
        # a GPU every line is a pass over memory, so the byte is read where it stands
        flags = (words[part] != 0).view(torch.int64)
        present = flags.mul_(0x0102040810204080).view(torch.uint8)[:, 7].int()
        torch.index_select(tables.stored, 0, present, out=bitmask[part])
        places = tables.places.index_select(0, bitmask[part].int())
        torch.gather(words[part], 1, places, out=values[part])


def _decompress_octets(
    values: Int[Tensor, "octets 4"],
    bitmask: UInt8[Tensor, " octets"],
    words: Int[Tensor, "octets 8"],
) -> None:
    """Puts the values of every two groups at their bits' places among zeros."""
    tables = _tables(str(words.device))
    for part in _parts(words):
        places = tables.places.index_select(0, bitmask[part].int())
        words[part].scatter_(1, places, values[part])


def _parts(words: Tensor) -> Iterator[slice]:
    size = _CPU_OCTETS if words.device.type == "cpu" else _GPU_OCTETS
    return (slice(at, at + size) for at in range(0, len(words), size))


def _whole(bitmask: Tensor, columns: int) -> Tensor:
    """Returns bytes as indices; half a byte at a row's end gets two bits of padding."""
    whole = bitmask.int()
    if columns % 8:
        high = whole[:, -1] >> 4
        whole[:, -1] += torch.where(high == 0, 0x30, 0xF0 - (high << 4))
    return whole


def _violation(weight: Tensor, name: str) -> str:
    flags = nonzero_bits(weight)
    counts = flags.view(len(weight), -1, 4).sum(-1)
    row, group = (counts > 2).nonzero()[0].tolist()
    four = weight[row, 4 * group : 4 * group + 4]
    found = f"row {row}, channels {4 * group}..{4 * group + 3} hold"
    if int((four.float() != 0).sum()) <= 2:
        return (
            f"{name}: {found} -0.0 beside two other weights, and only two of four can "
            "be stored. Apply `clear_negative_zeros` first."
        )
    return (
        f"{name} is not 2:4 sparse: {found} {int(counts[row, group])} non-zeros. Prune "
        "it first, or add it to `ignore`."
    )


def _bad_population(bitmask: Tensor, columns: int, name: str) -> str:
    shifts = torch.arange(8, device=bitmask.device)
    bits = (bitmask.int().unsqueeze(-1) >> shifts & 1).flatten(1)
    if bool(bits[:, columns:].any()):
        row = int(bits[:, columns:].any(-1).nonzero()[0])
        return (
            f"{name}: row {row} of the bitmask has bits beyond its {columns} channels. "
            "The checkpoint is damaged."
        )
    counts = bits[:, :columns].view(len(bits), -1, 4).sum(-1)
    row, group = (counts != 2).nonzero()[0].tolist()
    return (
        f"{name}: row {row} of the bitmask has {int(counts[row, group])} bits for "
        f"channels {4 * group}..{4 * group + 3}; it must have two. The checkpoint is "
        "damaged."
    )
