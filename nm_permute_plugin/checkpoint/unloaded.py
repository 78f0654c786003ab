# SPDX-License-Identifier: Apache-2.0
"""Find and keep the tensors of a model's folder that transformers does not load."""

import copy
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from safetensors import safe_open

from nm_permute_plugin.checkpoint.config import Json
from nm_permute_plugin.checkpoint.directory import INDEX, SINGLE, index_of
from nm_permute_plugin.checkpoint.disk import write_json
from nm_permute_plugin.checkpoint.shard_writer import ShardWriter
from nm_permute_plugin.checkpoint.shards import open_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "model-unloaded.safetensors"
"""Names the file of a checkpoint that holds what the model itself did not save."""

_CONSTANTS = re.compile(r"(.*\.)?(inv_freq|position_ids|masked_bias)")


@dataclass(frozen=True)
class Unloaded:
    """
    Is a tensor that a folder holds and a model of it has no place for.

    :param name: on disk
    :param place: what the name would be in the model
    """

    name: str
    place: str
    shape: tuple[int, ...]


def unloaded_tensors(source: Path, model: "PreTrainedModel") -> list[Unloaded]:
    """
    Finds the tensors of a folder's safetensors that transformers does not load.

    Constants that models compute anew are not among them: rotary frequencies, numbers of
    positions, causal masks.

    :param model: as transformers or llm-compressor made it of the folder
    """
    shapes = dict(_shapes(source))
    if not shapes:
        return []
    places = _places(model, shapes)
    return [
        Unloaded(name, place, shapes[name])
        for name, place in places.items()
        if not _is_constant(place, shapes[name])
    ]


def carry_tensors(source: Path, folder: Path, names: Sequence[str]) -> None:
    """
    Copies tensors of a model's folder into its checkpoint, but those that are there.

    :param names: of tensors, on disk
    """
    index = index_of(folder)
    files = [folder / SINGLE] if index is None else _files(folder, index)
    where = {name: file.name for file in files for name in open_shard(file).tensors}
    missing = [name for name in names if name not in where]
    if not missing:
        return
    tensors = {}
    for file in _weight_files(source):
        with _opened(file) as stored:
            for name in set(stored.keys()) & set(missing):
                tensors[name] = stored.get_tensor(name)
    announced = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with ShardWriter(folder / FILE, announced, {"format": "pt"}) as out:
        for name, tensor in tensors.items():
            out.write(name, tensor)
    shards = [open_shard(file) for file in [*files, folder / FILE]]
    size = sum(shard.path.stat().st_size - shard.data for shard in shards)
    where |= dict.fromkeys(tensors, FILE)
    content = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(where.items())),
    }
    write_json(folder / INDEX, content)
    logger.info(f"Carried {len(tensors)} tensors that transformers does not load")


def _places(model: "PreTrainedModel", names: Collection[str]) -> dict[str, str]:
    """Gives each name without a place in the model what transformers would call it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    # llm-compressor may have taken the model's experts apart; a new one is as it was.
    with torch.device("meta"):
        empty: Any = type(model)(copy.deepcopy(model.config))
    known = empty.state_dict()
    mapping = get_model_conversion_mapping(empty)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = empty.base_model_prefix
    buffers = {name for name, _ in empty.named_buffers()}
    places = {}
    for name in names:
        place, _ = rename_source_key(name, renamings, converters, prefix, known)
        if place not in known and name in known:
            place = name
        if place not in known and place not in buffers:
            places[name] = place
    return places


def _is_constant(name: str, shape: tuple[int, ...]) -> bool:
    # GPT-2's older checkpoints call the causal mask of four axes a bias.
    mask = name.endswith(".attn.bias") and len(shape) == 4
    return mask or _CONSTANTS.fullmatch(name) is not None


def _shapes(source: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for file in _weight_files(source):
        with _opened(file) as stored:
            for name in stored.keys():  # noqa: SIM118 - a file, not a dict
                yield name, tuple(stored.get_slice(name).get_shape())


def _weight_files(source: Path) -> list[Path]:
    """Lists the safetensors that make up a model's folder."""
    if not ((source / SINGLE).exists() or (source / INDEX).exists()):
        return []
    index = index_of(source)
    return [source / SINGLE] if index is None else _files(source, index)


def _files(folder: Path, index: Json) -> list[Path]:
    weight_map = index["weight_map"]
    named = weight_map.values() if isinstance(weight_map, dict) else ()
    names = {str(name) for name in named if name == Path(str(name)).name}
    return [folder / name for name in sorted(names)]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    with safe_open(file, "pt") as stored:
        yield stored
