# SPDX-License-Identifier: Apache-2.0
"""Read safetensors files a tensor at a time, and compare their checksums.

The safetensors package does not notice a changed byte. The files here are ordinary ones;
beside ``{"format": "pt"}`` their metadata holds a CRC-32 of every tensor, and one digest
for all files of a checkpoint, which other readers pass over.
"""

import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nm_permute_plugin._files import open_file, parse_json

CHECKSUMS = "nm_permute.crc32"
"""Names the entry of a file's metadata that holds the checksums."""

TOGETHER = "nm_permute.checkpoint"
"""Names the entry that holds the digest of all tensors of the whole checkpoint: files of
different runs differ in it."""

UNTIED = "0" * 64
"""Stands in a file's header until all files of its checkpoint are written."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Maps the dtypes of torch to what a header calls them."""

_LARGEST_HEADER = 100_000_000  # bytes that the safetensors package accepts
_LONGEST = 600  # characters of a reason
_PIECE = 1 << 24  # bytes that are read at a time to compare a checksum


class DamagedError(ValueError):
    """
    Is raised for a checkpoint that is not whole.

    :param path: the file
    :param reason: what is wrong with it, naming the tensor where there is one
    :param tensor: that tensor, empty where the whole file is meant
    """

    def __init__(self, path: Path, reason: str, tensor: str = "") -> None:
        if len(reason) > _LONGEST:  # which tells what a file holds, however much
            reason = f"{reason[:_LONGEST]}..."
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.tensor = tensor


@dataclass(frozen=True)
class Layout:
    """Holds what a header says of a tensor: dtype, shape and its bytes in the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """
    Is a safetensors file whose header has been read and found whole.

    :param data: where the tensors' bytes begin
    :param tensors: by name
    :param metadata: the header's ``__metadata__``
    :param checksums: CRC-32 by name; None for a file without them
    """

    path: Path
    data: int
    tensors: Mapping[str, Layout]
    metadata: Mapping[str, str]
    checksums: Mapping[str, int] | None

    def read(self, name: str) -> Tensor:
        """
        Reads a tensor of the file, and compares its checksum where there is one.

        :raises DamagedError: if its bytes are not those that were written
        """
        layout = self.tensors[name]
        content = bytearray(layout.end - layout.start)
        with open_file(self.path) as file:
            file.seek(self.data + layout.start)
            if file.readinto(content) != len(content):
                raise DamagedError(self.path, f"{name} is cut off", name)
        if self.checksums is not None and self.checksums[name] != zlib.crc32(
            content, checksum_seed(name, layout)
        ):
            raise self._changed(name)
        if not content:
            return torch.empty(layout.shape, dtype=layout.dtype)
        return torch.frombuffer(content, dtype=layout.dtype).view(layout.shape)

    def check(self) -> None:
        """
        Compares every checksum, without holding more than a piece of a tensor.

        :raises DamagedError: at the first that does not agree
        """
        if self.checksums is None:
            return
        with open_file(self.path) as file:
            for name, layout in self.tensors.items():
                file.seek(self.data + layout.start)
                found, left = checksum_seed(name, layout), layout.end - layout.start
                while left and (piece := file.read(min(left, _PIECE))):
                    found, left = zlib.crc32(piece, found), left - len(piece)
                if left or found != self.checksums[name]:
                    raise self._changed(name)

    def _changed(self, name: str) -> DamagedError:
        return DamagedError(
            self.path,
            f"the bytes of {name} are not those that were written (CRC-32). Fetch or "
            "make the checkpoint again.",
            name,
        )


def open_shard(path: Path) -> Shard:
    """
    Reads a file's header and checks that header and file belong together.

    :raises DamagedError: for a file that is missing, cut off, or whose header is not
        one, naming the tensor where there is one
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise DamagedError(
                    path,
                    f"is cut off: it has {size} bytes, and its header alone should "
                    f"have {length}",
                )
            header = parse_json(file.read(length).decode(), allowed=2 * size)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("metadata must be text")
        tensors = {name: _layout(entry) for name, entry in header.items()}
        sums = metadata.get(CHECKSUMS)
        checksums = None if sums is None else _checksums(parse_json(sums))
    except OSError as error:
        raise DamagedError(path, f"cannot be read: {error.strerror}") from error
    except DamagedError:
        raise
    except (
        AttributeError,
        KeyError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise DamagedError(path, f"its header is damaged ({error})") from error
    _check_layout(path, tensors, size - 8 - length)
    if checksums is not None and set(checksums) != set(tensors):
        odd = sorted(set(checksums) ^ set(tensors))
        raise DamagedError(
            path,
            f"checksums and tensors name different things: {', '.join(odd)}",
            odd[0],
        )
    return Shard(path, 8 + length, tensors, metadata, checksums)


def refuse_mixture(shards: Sequence[Shard]) -> None:
    """
    Checks that the files of a checkpoint were written together.

    :raises DamagedError: for a file that is of another run than the first
    """
    for shard in shards[1:]:
        if _run(shard) != _run(shards[0]):
            raise DamagedError(
                shard.path,
                f"was not written together with {shards[0].path.name}: the two are of "
                "different runs. Fetch or make the whole checkpoint again.",
            )


def _run(shard: Shard) -> str | None:
    """Tells which files a file was written with; None where nothing says so."""
    digest = shard.metadata.get(TOGETHER)
    return None if digest == UNTIED else digest


def _layout(entry: Mapping[str, object]) -> Layout:
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise KeyError(f"an entry holds {', '.join(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError("shape and offsets must be lists")
    numbers = [*shape, *offsets]
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in numbers):
        raise TypeError(f"shape {shape}, offsets {offsets}")
    return Layout(DTYPES[str(dtype)], tuple(shape), *offsets)


def _checksums(sums: Mapping[str, str]) -> dict[str, int]:
    return {name: int(value, 16) for name, value in sums.items()}


def _check_layout(path: Path, tensors: Mapping[str, Layout], size: int) -> None:
    """Checks that the tensors fill the data one after another, without gap or overlap."""
    at = 0
    for name, layout in sorted(
        tensors.items(), key=lambda item: (item[1].start, item[1].end)
    ):
        length = layout.numel * layout.dtype.itemsize
        if layout.start != at or layout.end - layout.start != length:
            raise DamagedError(
                path,
                f"{name}, {layout.dtype} {list(layout.shape)}, should fill {length} "
                f"bytes from {at}; its header says {layout.start} to {layout.end}",
                name,
            )
        at = layout.end
        if at > size:
            raise DamagedError(
                path,
                f"is cut off: {name} should end at byte {at} of the data, which has "
                f"{size}",
                name,
            )
    if at != size:
        raise DamagedError(path, f"{size - at} bytes belong to no tensor")


def checksum_seed(name: str, layout: Layout) -> int:
    """Starts a checksum, so that it covers what the header says of the tensor too."""
    return zlib.crc32(f"{name} {NAMES[layout.dtype]} {layout.shape}".encode())
