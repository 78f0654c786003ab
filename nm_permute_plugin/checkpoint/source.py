# SPDX-License-Identifier: Apache-2.0
"""The folder that a model was loaded from: which of its files travel into a checkpoint."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger

from nm_permute_plugin._files import read_json
from nm_permute_plugin.checkpoint.directory import INDEX, SINGLE, index_of
from nm_permute_plugin.checkpoint.disk import copy_file
from nm_permute_plugin.checkpoint.record import FOLDER
from nm_permute_plugin.maths.permutation import Permutation

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pth?|ckpt|gguf|ggml|h5|hdf5|msgpack|npz|ot|pb|tflite|mlmodel"
    r"|engine|plan|pkl|pickle|distcp|nemo|pte|onnx.*)(\.index\.json)?|adapter_config\.json",
    re.IGNORECASE,
)
"""Names that weights have in one framework or another. An adapter's config counts with
them: beside a config.json alone it has transformers look for the adapter."""


@dataclass(frozen=True)
class Source:
    """
    Is the folder that a model was loaded from, and what its checkpoints take from it.

    :param carried: its tensors that transformers does not load, and that stay as they are
    :param perms: by space, the permutations of an earlier fold that the folder's record
        tells
    :param report: the report of that earlier run; None where there was none
    """

    path: Path
    carried: tuple[str, ...] = ()
    perms: Mapping[str, Permutation] = field(default_factory=dict)
    report: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Listing:
    """
    Holds the names of a folder's files, from the folder on.

    :param travels: what a checkpoint of the model takes along
    :param weights: weights and folders of weights, which stay behind
    :param links: links that lead out of the folder, or to folders, which stay behind
    """

    travels: tuple[Path, ...]
    weights: tuple[str, ...]
    links: tuple[str, ...]


def folder_of(model: Any) -> Path | None:
    """
    Finds the folder that a transformers model was loaded from; None if there is none.

    A model of the Hugging Face hub has its folder in the hub's cache; small files of it
    that are not there yet are fetched, where the hub can be reached.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name).resolve()
    commit = getattr(model.config, "_commit_hash", None)
    return None if commit is None else _from_hub(name, commit)


def _from_hub(name: str, commit: str) -> Path | None:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    try:
        found = snapshot_download(
            name,
            revision=commit,
            allow_patterns=[
                "*.json",
                "*.jinja",
                "*.txt",
                "*.md",
                "*.model",
                "LICENSE*",
                "NOTICE*",
            ],
            ignore_patterns=["*/*.json", "*/*.md", "*/*.txt", "*/*.model"],
        )
        return Path(found)
    except (HTTPError, OSError, ValueError) as error:
        cached = try_to_load_from_cache(name, "config.json", revision=commit)
        logger.warning(
            f"Files of {name} that are no weights, its license or processor say, travel "
            "into the checkpoint only if they are in the hub's cache: "
            f"{' '.join(str(error).split())}"
        )
        return Path(cached).parent if isinstance(cached, str) else None


def list_files(source: Path) -> Listing:
    """
    Says which files of a model's folder travel into a checkpoint.

    Files that are not weights do, in subfolders too. A subfolder that holds weights is
    another model (``original``, ``onnx``, a checkpoint of the training) and stays behind
    as a whole, unless it is a module that the ``modules.json`` of a sentence encoder
    names. Names that start with a dot are bookkeeping (``.git``, ``.cache``).
    """
    travels: list[Path] = []
    weights: list[str] = []
    links: list[str] = []
    modules = module_folders(source)
    for entry in sorted(source.iterdir()):
        if _is_bookkeeping(entry.name):
            continue
        if _leads_out(entry, source):
            links.append(entry.name)
        elif entry.is_dir():
            inside = list(_below(entry, source, links))
            if entry.name not in modules and any(_is_weight(file) for file in inside):
                weights.append(f"{entry.name}/")
            else:
                travels += [file.relative_to(source) for file in inside]
        elif entry.is_file():
            if _is_weight(entry):
                weights.append(entry.name)
            else:
                travels.append(entry.relative_to(source))
    return Listing(tuple(travels), tuple(weights), tuple(links))


def module_folders(source: Path) -> dict[str, list[str]]:
    """Finds a sentence encoder's modules beside the model, and the weights of each."""
    try:
        listed = read_json(source / "modules.json")
        names = {str(entry["path"]) for entry in listed} - {""}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {
        name: [
            file.name for file in _below(source / name, source, []) if _is_weight(file)
        ]
        for name in sorted(names)
        if name == Path(name).name and (source / name).is_dir()
    }


def check_files(source: Path) -> None:
    """
    Logs which files of a model's folder do not travel, and why, before any work.

    :raises PermissionError: for one that travels and cannot be read
    """
    listing = list_files(source)
    for name in listing.travels:
        if not os.access(source / name, os.R_OK):
            raise PermissionError(
                f"{source / name} may not be read, and belongs to the model's folder; "
                "make it readable, or take it out of the folder"
            )
    if listing.links:
        logger.warning(
            f"{source}: {', '.join(listing.links)} does not travel into the checkpoint: a "
            "link to a folder, out of this one or nowhere; put the file itself there to "
            "take it along"
        )
    own = {SINGLE, INDEX, f"{FOLDER}/"}
    if (source / INDEX).exists() and (index := index_of(source)) is not None:
        named = index.get("weight_map")
        own |= set(named.values()) if isinstance(named, dict) else set()
    others = [name for name in listing.weights if name not in own]
    if others:
        logger.info(
            f"{source}: the checkpoint has weights of its own; these do not travel: "
            f"{', '.join(others)}"
        )


def carry_files(source: Path, folder: Path, target: Path | None = None) -> None:
    """
    Copies the files that travel into a checkpoint's folder, but never over one there.

    Links are copied as the files they lead to.

    :param target: the place that ``folder`` will take; what is there stays as well
    """
    if not source.is_dir():
        logger.warning(
            f"{source} is gone: what it held beside the weights, such as a license, does "
            "not travel into the checkpoint"
        )
        return
    for name in list_files(source).travels:
        to = folder / name
        there = os.path.lexists(to) or (target and os.path.lexists(target / name))
        if there or folder.is_relative_to(source / name.parts[0]):
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / name, to)


def _below(folder: Path, source: Path, links: list[str]) -> Iterator[Path]:
    """Yields the files below a folder, and adds the links that stay behind."""
    for path, folders, files in os.walk(folder):
        for name in sorted(folders):
            if _is_bookkeeping(name) or Path(path, name).is_symlink():
                folders.remove(name)
        for file in (Path(path, name) for name in sorted(files)):
            if _leads_out(file, source):
                links.append(str(file.relative_to(source)))
            elif file.is_file() and not _is_bookkeeping(file.name):
                yield file


def _is_weight(file: Path) -> bool:
    return _WEIGHTS.fullmatch(file.name) is not None


def _is_bookkeeping(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _leads_out(path: Path, source: Path) -> bool:
    """
    Tells whether a link leads out of a folder, to a folder, or nowhere.

    The hub's cache keeps each file under its checksum, and a snapshot links to it.
    """
    if not path.is_symlink():
        return False
    if not path.exists():
        return True
    target = path.resolve()
    store = target.parent
    cached = store.name == "blobs" and store.parent.name.startswith("models--")
    return path.is_dir() or not (cached or target.is_relative_to(source.resolve()))
