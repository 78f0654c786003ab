# SPDX-License-Identifier: Apache-2.0
"""Read a checkpoint directory as one mapping from tensor names to tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nm_permute_plugin import _files
from nm_permute_plugin.checkpoint.bitmask import decompress_any
from nm_permute_plugin.checkpoint.codec import decompress
from nm_permute_plugin.checkpoint.config import Format, Json
from nm_permute_plugin.checkpoint.shards import (
    DamagedError,
    Layout,
    Shard,
    open_shard,
    refuse_mixture,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PARTS: dict[Format, tuple[str, ...]] = {
    "dense": ("weight",),
    "sparse-24-bitmask": ("compressed", "bitmask", "shape"),
    "sparse-bitmask": ("compressed", "bitmask", "row_offsets", "shape"),
}
"""Lists the tensors that hold the weight of a module, for each way of storing it."""


@dataclass(frozen=True)
class Checkpoint:
    """
    Is a directory whose index and headers have been read and found consistent.

    :param config: the content of ``config.json``
    :param index: the index file of a sharded checkpoint, None for a single file
    :param shards: the files, by name
    :param where: the file of each tensor
    :param formats: how each module's weight is stored
    """

    path: Path
    config: Json
    index: Json | None
    shards: tuple[Shard, ...]
    where: Mapping[str, Shard]
    formats: Mapping[str, Format]

    def read(self, name: str) -> Tensor:
        """
        Reads a tensor as it is stored.

        :raises DamagedError: if its bytes are not those that were written
        """
        return self.where[name].read(name)

    def matrices(self) -> list[str]:
        """Lists the modules whose weight has two axes, in the order of the files."""
        return [
            module
            for module, stored in self.formats.items()
            if stored != "dense" or len(self._layout(module).shape) == 2
        ]

    @property
    def bytes(self) -> tuple[int, int]:
        """How many bytes all tensors take as stored, and with every matrix stored dense."""
        stored = {
            name: shard.tensors[name].end - shard.tensors[name].start
            for name, shard in self.where.items()
        }
        dense = dict(stored)
        for module, format in self.formats.items():
            if format != "dense":
                dtype, (rows, columns) = self.dense_layout(module)
                dense |= {f"{module}.{part}": 0 for part in PARTS[format]}
                dense[module] = rows * columns * dtype.itemsize
        return sum(stored.values()), sum(dense.values())

    def file(self, module: str) -> Path:
        """Returns the file that holds the values of a module's weight."""
        return self.where[f"{module}.{PARTS[self.formats[module]][0]}"].path

    def dense_layout(self, module: str) -> tuple[torch.dtype, tuple[int, int]]:
        """Returns dtype and dense shape of a matrix, without reading its values."""
        layout = self._layout(module)
        sizes = list(layout.shape)
        if self.formats[module] != "dense":
            sizes = self._stored_sizes(module)
        if len(sizes) != 2:
            raise DamagedError(
                self.file(module), f"{module} has the shape {sizes}", module
            )
        rows, columns = sizes
        return layout.dtype, (rows, columns)

    def _stored_sizes(self, module: str) -> list[int]:
        """Reads the dense shape of a module that is stored sparse, and doubts it."""
        name = f"{module}.shape"
        stored = self.read(name).flatten()
        sizes = stored.tolist()
        bits = self.where[f"{module}.bitmask"].tensors[f"{module}.bitmask"].numel * 8
        is_whole = stored.dtype in (torch.int64, torch.int32)
        if not is_whole or len(sizes) != 2 or min(sizes) < 0:
            raise DamagedError(self.file(module), f"{name} says {sizes}", name)
        if sizes[0] * sizes[1] > bits:
            raise DamagedError(
                self.file(module), f"{name} says {sizes}, for {bits} bits", name
            )
        return [int(size) for size in sizes]

    def _layout(self, module: str) -> Layout:
        name = f"{module}.{PARTS[self.formats[module]][0]}"
        return self.where[name].tensors[name]

    def weight(self, module: str) -> Tensor:
        """
        Makes the dense weight of a module, however it is stored.

        :raises DamagedError: if its tensors do not belong together, naming the file
        """
        stored = self.formats[module]
        if stored != "dense":
            self._stored_sizes(module)
        parts = {part: self.read(f"{module}.{part}") for part in PARTS[stored]}
        try:
            if stored == "sparse-24-bitmask":
                return decompress(**parts, name=module)
            if stored == "sparse-bitmask":
                return decompress_any(**parts, name=module)
        except ValueError as error:
            raise DamagedError(self.file(module), str(error), module) from error
        return parts["weight"]


def open_checkpoint(path: Path) -> Checkpoint:
    """
    Reads config, index and headers of a checkpoint, and checks that they agree.

    :raises DamagedError: if a file is missing or damaged, or they do not agree, naming
        file and tensor
    """
    config = read_json(path / "config.json")
    index = index_of(path)
    named = _weight_map(path, index)
    files = sorted({SINGLE} if named is None else set(named.values()))
    if named is not None:
        refuse_missing([path / file for file in files])
    shards = tuple(open_shard(path / file) for file in files)
    where: dict[str, Shard] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in where:
                raise DamagedError(
                    shard.path, f"{name} is in {where[name].path.name} too", name
                )
            where[name] = shard
    if named is not None:
        _compare(path / INDEX, named, where)
    refuse_mixture(shards)
    return Checkpoint(path, config, index, shards, where, stored_formats(where))


def index_of(path: Path) -> Json | None:
    """
    Reads the index of a checkpoint; None where the single file is all there is.

    An index beside the single file counts if it names that file.

    :raises DamagedError: if there is neither a single file nor an index
    """
    if not (path / SINGLE).exists():
        return read_json(path / INDEX)
    if not (path / INDEX).exists():
        return None
    index = read_json(path / INDEX)
    named = index.get("weight_map")
    return index if isinstance(named, dict) and SINGLE in named.values() else None


def stored_formats(names: Mapping[str, Shard]) -> dict[str, Format]:
    """
    Tells from the names of a checkpoint's tensors how each module's weight is stored.

    :raises DamagedError: for a weight that is only partly there, or there twice
    """
    formats: dict[str, Format] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        if part == "weight":
            formats.setdefault(module, "dense")
        if part not in ("compressed", "bitmask"):
            continue
        file = names[name].path
        general = f"{module}.row_offsets" in names
        stored: Format = "sparse-bitmask" if general else "sparse-24-bitmask"
        for other in PARTS[stored]:
            if f"{module}.{other}" not in names:
                raise DamagedError(
                    file, f"has {name}, but no {module}.{other}", f"{module}.{other}"
                )
        if f"{module}.weight" in names:
            raise DamagedError(file, f"has {name}, and {module}.weight beside it", name)
        formats[module] = stored
    return formats


def read_json(path: Path) -> Json:
    """
    Reads a JSON file that holds an object.

    :raises DamagedError: if it is missing or does not
    """
    try:
        content = _files.read_json(path)
    except OSError as error:
        raise DamagedError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedError(path, str(error).removeprefix(f"{path} ")) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DamagedError(path, f"must hold an object, it holds a {kind}")
    return content


def refuse_missing(files: Iterable[Path]) -> None:
    """
    Checks that the files are there that an index names.

    :raises DamagedError: for one that is not
    """
    for file in files:
        if not file.exists():
            raise DamagedError(file, f"does not exist, and {INDEX} names it")


def is_file_name(name: object) -> bool:
    """Tells whether an index may call a file so: it lies beside the index."""
    text = name if isinstance(name, str) else ""
    return text != "" and text.isprintable() and Path(text).name == text


def _weight_map(path: Path, index: Json | None) -> dict[str, str] | None:
    if index is None:
        return None
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named:
        raise DamagedError(path / INDEX, "has no weight_map")
    for name, file in named.items():
        if not is_file_name(file):
            raise DamagedError(path / INDEX, f"{name} is said to be in {file!r}", name)
    return named


def _compare(index: Path, named: Mapping[str, str], where: Mapping[str, Shard]) -> None:
    for name, file in named.items():
        if name not in where:
            raise DamagedError(index, f"says that {name} is in {file}, it is not", name)
        if where[name].path.name != file:
            raise DamagedError(
                index,
                f"says that {name} is in {file}, it is in {where[name].path.name}",
                name,
            )
    for name, shard in where.items():
        if name not in named:
            raise DamagedError(index, f"has no {name}, as {shard.path.name} has", name)
