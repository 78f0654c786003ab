# SPDX-License-Identifier: Apache-2.0
"""Write safetensors files a tensor at a time, with checksums.

The safetensors package holds a whole file in memory to write it.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from nm_permute_plugin.checkpoint.shards import (
    CHECKSUMS,
    NAMES,
    TOGETHER,
    UNTIED,
    Layout,
    checksum_seed,
    open_shard,
)


class ShardWriter:
    """
    Writes a safetensors file tensor by tensor, in any order; a context manager.

    :param tensors: dtype and shape of everything that will be written
    :param metadata: kept beside the checksums
    :raises OSError: if the file cannot be written, naming file and tensor
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        self._path = path
        own = (CHECKSUMS, TOGETHER)
        self._metadata = {k: v for k, v in metadata.items() if k not in own}
        self._sums: dict[str, int] = {}
        self._layouts: dict[str, Layout] = {}
        at = 0
        # widest elements first, as the safetensors package does: all are aligned
        for name in sorted(
            tensors, key=lambda name: (-tensors[name][0].itemsize, name)
        ):
            dtype, shape = tensors[name]
            size = math.prod(shape) * dtype.itemsize
            self._layouts[name] = Layout(dtype, shape, at, at + size)
            at += size
        self._data = len(self._header())

    def __enter__(self) -> "ShardWriter":
        self._file = self._path.open("xb", buffering=0)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """
        Puts a tensor at its place in the file.

        :raises ValueError: if its dtype or shape is not the one that was announced
        """
        layout = self._layouts[name]
        if (tensor.dtype, tuple(tensor.shape)) != (layout.dtype, layout.shape):
            raise ValueError(
                f"{name} was announced as {layout.dtype} {layout.shape}, and is "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
        flat = tensor.detach().cpu().contiguous().view(-1)
        content = flat.view(torch.uint8).numpy().data if len(flat) else b""
        self._sums[name] = zlib.crc32(content, checksum_seed(name, layout))
        self._put(content, self._data + layout.start, name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                missing = sorted(self._layouts.keys() - self._sums.keys())
                if missing:
                    raise ValueError(f"{self._path}: never written: {missing}")
                self._put(self._header(), 0, "its header")
                os.fsync(self._file.fileno())

    def _put(self, content: bytes | memoryview, at: int, name: str) -> None:
        try:
            self._file.seek(at)
            left = memoryview(content)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{name} could not be written to {self._path.name}: {error.strerror}",
            ) from error

    def _header(self) -> bytes:
        """Makes the header, which is as long before the checksums are known as after."""
        sums = {name: f"{self._sums.get(name, 0):08x}" for name in self._layouts}
        metadata = {**self._metadata, TOGETHER: UNTIED, CHECKSUMS: json.dumps(sums)}
        entries = {
            name: {
                "dtype": NAMES[layout.dtype],
                "shape": list(layout.shape),
                "data_offsets": [layout.start, layout.end],
            }
            for name, layout in self._layouts.items()
        }
        text = json.dumps({"__metadata__": metadata, **entries}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def tie(paths: Sequence[Path]) -> None:
    """
    Writes one digest of all tensors into the header of each file of a checkpoint.

    :param paths: all files of the checkpoint, as ``ShardWriter`` left them
    """
    shards = [open_shard(path) for path in paths]
    sums = sorted(item for s in shards for item in (s.checksums or {}).items())
    digest = hashlib.sha256(json.dumps(sums).encode()).hexdigest()
    entry = f'"{TOGETHER}": "'.encode()
    for shard in shards:
        with shard.path.open("r+b") as file:
            at = file.read(shard.data).index(entry + UNTIED.encode()) + len(entry)
            file.seek(at)
            file.write(digest.encode())
