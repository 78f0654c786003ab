# SPDX-License-Identifier: Apache-2.0
"""Keep the record of a run with its checkpoint: its permutations and its figures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nm_permute_plugin._files import read_json
from nm_permute_plugin.checkpoint.shards import open_shard
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, compose

FOLDER = "nm_permute"
"""Names the folder of the record inside the checkpoint: vLLM takes every *.safetensors
beside the weights for weights."""


def write_record(
    checkpoint: Path, perms: Mapping[str, Permutation], report: Mapping[str, object]
) -> None:
    """
    Writes ``nm_permute/permutations.safetensors`` and ``nm_permute/report.json``.

    :param perms: by space, ``new[j] = old[perm[j]]``
    :param report: must fit into JSON
    """
    folder = checkpoint / FOLDER
    folder.mkdir(exist_ok=True)
    stored = {name: perm.cpu().contiguous() for name, perm in perms.items()}
    save_file(stored, folder / "permutations.safetensors")
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def read_record(checkpoint: Path) -> tuple[dict[str, Permutation], dict[str, object]]:
    """
    Reads the permutations and the report that ``write_record`` wrote.

    :raises FileNotFoundError: if the checkpoint has no record
    :raises ValueError: if the record cannot be read, naming its file
    """
    folder = checkpoint / FOLDER
    report, path = (
        read_json(folder / "report.json"),
        folder / "permutations.safetensors",
    )
    if not isinstance(report, dict):
        raise ValueError(f"{folder}/report.json must hold an object")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    stored = open_shard(path)
    for name, layout in stored.tensors.items():
        if layout.dtype != torch.int64 or len(layout.shape) != 1:
            raise ValueError(
                f"{path}: {name} is {layout.dtype} {list(layout.shape)}, and no permutation"
            )
    return {name: stored.read(name) for name in stored.tensors}, report


def earlier_record(
    folder: Path,
) -> tuple[dict[str, Permutation], dict[str, object]] | None:
    """
    Reads a folder's record, or returns None where there is none.

    :raises ValueError: if there is a record and it cannot be read
    """
    if not (folder / FOLDER).is_dir():
        return None
    try:
        return read_record(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / FOLDER} is no whole record of a run ({error}). Fetch or make the "
            "folder again, or remove it where the channels never moved."
        ) from error


def composed(
    earlier: Mapping[str, Tensor],
    earlier_report: Mapping[str, object],
    perms: Mapping[str, Tensor],
    report: Mapping[str, object],
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """
    Makes the record of two runs, one after the other: from the first model to the last.

    :param perms: by space, of the later run
    :return: the permutations of both in one, and the later report with the earlier in it
    """
    both = {name: perm.cpu() for name, perm in {**earlier, **perms}.items()}
    for name in earlier.keys() & perms.keys():
        both[name] = compose(earlier[name].cpu(), perms[name].cpu())
    told = {**report, "earlier": dict(earlier_report)}
    if "base_model" in earlier_report:
        told["base_model"] = earlier_report["base_model"]
    return both, told


@dataclass(frozen=True)
class Promise:
    """
    Says what a run pruned.

    :param transposed: those of the modules that are stored as [in, out]
    """

    modules: list[str]
    pattern: NMPattern
    transposed: list[str]


def read_promise(checkpoint: Path) -> Promise | None:
    """
    Reads what a run pruned in a checkpoint; returns None without a record of it.

    :raises ValueError: if there is a record and it cannot be read
    """
    path = checkpoint / FOLDER / "report.json"
    if not path.exists():
        return None
    try:
        report = read_json(path)
        pruned = [str(name) for name in report["pruned"]]
        transposed = [str(name) for name in report.get("transposed", ())]
        pattern = NMPattern.parse(report["modifier"]["mask_structure"])
        return Promise(pruned, pattern, transposed)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record of a run: {error!r}") from error
