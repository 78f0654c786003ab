# SPDX-License-Identifier: Apache-2.0
"""
Values of tensors and numbers in a folder: whole or not at all, and nothing is pickled.

Tensors are written by ``torch.distributed.checkpoint``, as safetensors; everything else is
JSON.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import (
    tree_flatten,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from nm_permute_plugin.checkpoint.transaction import directory

_JSON = "value.json"

BYTES_OF_A_FILE = 1 << 30
"""Tensors of one file: each file is in memory twice while it is written."""


def write_value(folder: Path, value: object, about: dict[str, str]) -> None:
    """
    Write a tree of dicts, lists and tuples whose leaves are tensors, numbers and words.

    :param folder: a resolved path; what it held is replaced once everything is on disk
    :param about: words that ``read_about`` gives back
    :raises OSError: if it cannot be written; the folder is what it was
    """
    leaves, tree = tree_flatten(value)
    tensors: dict[str, Tensor] = {}
    told: list[object] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            told.append([_word(leaf.dtype), list(leaf.shape), str(leaf.device)])
            tensors[str(len(told) - 1)] = leaf.detach()
        else:
            told.append({"value": leaf})
    said = {"about": about, "tree": treespec_dumps(tree), "leaves": told}
    with directory(folder) as fresh:
        (fresh / _JSON).write_text(json.dumps(said))
        if tensors:
            _write_tensors(fresh, _apart(tensors))


def read_value(folder: Path) -> Any:
    """
    Read what ``write_value`` wrote; tensors are on the devices that they were on.

    :raises OSError: if there is nothing
    :raises ValueError: if it cannot be read
    """
    try:
        said = json.loads((folder / _JSON).read_text())
        leaves = [_leaf(leaf) for leaf in said["leaves"]]
        tensors = {
            str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
        }
        if tensors:
            _read_tensors(folder, tensors)
        return tree_unflatten(leaves, treespec_loads(said["tree"]))
    except OSError:
        raise
    except Exception as error:  # whatever a file that is not as it was written causes
        raise ValueError(f"{folder} cannot be read: {error!r}") from error


def read_about(folder: Path) -> dict[str, str]:
    """
    Read what ``write_value`` was told about a value.

    :raises OSError: if there is nothing
    :raises ValueError: if it cannot be read
    """
    try:
        about: dict[str, str] = json.loads((folder / _JSON).read_text())["about"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read: {error!r}") from error
    return about


def bytes_of(value: object) -> int:
    """Count the bytes of a value's tensors."""
    return sum(x.nbytes for x in tree_flatten(value)[0] if isinstance(x, Tensor))


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        memory = own.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != own.nbytes:
            own = own.clone()
        seen.add(memory.data_ptr())
        apart[name] = own
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


def _read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        ((cause, _),) = error.failures.values()
        raise cause from None


def _leaf(said: Any) -> object:
    if isinstance(said, dict):
        return said["value"]
    dtype, shape, device = said
    return torch.empty(shape, dtype=getattr(torch, dtype), device=device)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
