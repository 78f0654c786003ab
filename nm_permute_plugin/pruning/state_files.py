# SPDX-License-Identifier: Apache-2.0
"""
Values of tensors and numbers in a folder: whole or not at all, and nothing is pickled.

Tensors are written by ``torch.distributed.checkpoint``, as safetensors; everything else is
JSON. Before anything is read, each file is compared with its SHA-256.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from nm_permute_plugin._files import read_json
from nm_permute_plugin.checkpoint.checksums import digests
from nm_permute_plugin.checkpoint.shards import open_shard
from nm_permute_plugin.checkpoint.transaction import directory

_JSON, _SUMS = "value.json", "sums.json"

BYTES_OF_A_FILE = 1 << 30
"""Tensors of one file: each file is in memory twice while it is written."""


def write_value(folder: Path, value: object, about: dict[str, str]) -> None:
    """
    Write a tree of dicts, lists and tuples whose leaves are tensors, numbers and words.

    :param folder: a resolved path; what it held is replaced once everything is on disk
    :param about: words that ``read_about`` gives back
    :raises OSError: if it cannot be written; the folder is what it was
    """
    tensors: list[Tensor] = []
    said = {"about": about, "value": _told(value, tensors)}
    with directory(folder) as fresh:
        (fresh / _JSON).write_text(json.dumps(said))
        if tensors:
            _write_tensors(fresh, _apart(tensors))
        names = sorted(path.name for path in fresh.iterdir())
        sums = dict(zip(names, digests(fresh, names), strict=True))
        (fresh / _SUMS).write_text(json.dumps({"files": sums}))


def read_value(folder: Path) -> Any:
    """
    Read what ``write_value`` wrote; tensors are on the devices that they were on.

    :raises OSError: if there is nothing
    :raises ValueError: if it is not as it was written, naming the file
    """
    try:
        names = _same(folder)
        files = [folder / name for name in names if name.endswith(".safetensors")]
        shards = [open_shard(file) for file in files]
        where = {name: shard for shard in shards for name in shard.tensors}

        def tensor(number: int, device: str) -> Tensor:
            return where[str(number)].read(str(number)).to(device)

        return _value(read_json(folder / _JSON)["value"], tensor)
    except OSError:
        raise
    except Exception as error:  # whatever a file that is not as it was written causes
        raise ValueError(f"{folder} cannot be read: {error!r}") from error


def read_about(folder: Path) -> dict[str, str]:
    """
    Read what ``write_value`` was told about a value.

    :raises OSError: if there is nothing
    :raises ValueError: if it is not as it was written, naming the file
    """
    try:
        _same(folder, _JSON)
        about = read_json(folder / _JSON)["about"]
        return {str(name): str(words) for name, words in about.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read: {error!r}") from error


def bytes_of(value: object) -> int:
    """Count the bytes of a value's tensors."""
    return sum(x.nbytes for x in tree_leaves(value) if isinstance(x, Tensor))


def _same(folder: Path, only: str | None = None) -> list[str]:
    """
    Compare the files of a folder, or one of them, with what was written.

    :return: the names of those that were compared
    :raises ValueError: if one is another
    """
    sums = read_json(folder / _SUMS)["files"]
    names = [name for name in sums if only in (None, name)]
    if _JSON not in names or any(name != Path(name).name for name in names):
        raise ValueError(f"{_SUMS} does not name the files of this folder")
    for name, digest in zip(names, digests(folder, names), strict=True):
        if digest != sums[name]:
            raise ValueError(f"{name} is not as it was written (SHA-256)")
    return names


def _told(value: object, tensors: list[Tensor]) -> object:
    """A value in JSON; its tensors are added to a list, and told by their numbers."""
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {"tensor": [len(tensors) - 1, str(value.device)]}
    if isinstance(value, dict):
        return {"dict": [[key, _told(of, tensors)] for key, of in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_told(of, tensors) for of in value]}
    return value


def _value(told: Any, tensor: Callable[[int, str], Tensor]) -> object:
    """What ``_told`` told, with tensors by their numbers and devices."""
    if not isinstance(told, dict):
        return told
    ((kind, of),) = told.items()
    if kind == "tensor":
        return tensor(*of)
    if kind == "dict":
        return {key: _value(each, tensor) for key, each in of}
    made = [_value(each, tensor) for each in of]
    return {"list": made, "tuple": tuple(made)}[kind]


def _apart(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory, as safetensors wants them, by number."""
    seen: set[int] = set()
    apart = {}
    for number, tensor in enumerate(tensors):
        own = tensor.contiguous()
        memory = own.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != own.nbytes:
            own = own.clone()
        seen.add(memory.data_ptr())
        apart[str(number)] = own
    return apart


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    files, written = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + written // BYTES_OF_A_FILE
        written += tensor.nbytes
    numbers = {
        number: place for place, number in enumerate(sorted({*files.values()}), 1)
    }
    writer = HuggingFaceStorageWriter(
        str(folder), {name: numbers[file] for name, file in files.items()}
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process only
            save(tensors, storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        ((cause, _),) = error.failures.values()
        if not isinstance(cause, Exception):
            raise cause from None  # the interrupt of a person, or of a signal
        raise OSError(f"cannot write to {folder}: {cause}") from cause
