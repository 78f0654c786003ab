# SPDX-License-Identifier: Apache-2.0
"""The record of a run, kept with the checkpoint: its orders and its figures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation

# In a folder of its own: vLLM takes every *.safetensors beside the weights for weights.
FOLDER = "nm_permute"


def write_record(
    checkpoint: Path, perms: Mapping[str, Permutation], report: Mapping[str, object]
) -> None:
    """
    Write ``nm_permute/permutations.safetensors`` and ``nm_permute/report.json``.

    :param perms: by space, ``new[j] = old[perm[j]]``
    :param report: what JSON can hold
    """
    folder = checkpoint / FOLDER
    folder.mkdir(exist_ok=True)
    stored = {name: perm.cpu().contiguous() for name, perm in perms.items()}
    save_file(stored, folder / "permutations.safetensors")
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def read_record(checkpoint: Path) -> tuple[dict[str, Permutation], dict[str, object]]:
    """
    The orders and the report of ``write_record``.

    :raises FileNotFoundError: if the checkpoint has no record
    """
    folder = checkpoint / FOLDER
    report: dict[str, object] = json.loads((folder / "report.json").read_text())
    return load_file(folder / "permutations.safetensors"), report


@dataclass(frozen=True)
class Promise:
    """
    What a run pruned.

    :param transposed: those of the modules that are stored as [in, out]
    """

    modules: list[str]
    pattern: NMPattern
    transposed: list[str]


def read_promise(checkpoint: Path) -> Promise | None:
    """
    What a run pruned in a checkpoint; None without a record of it.

    :raises ValueError: if there is a record and it cannot be read
    """
    path = checkpoint / FOLDER / "report.json"
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text())
        pruned = [str(name) for name in report["pruned"]]
        transposed = [str(name) for name in report.get("transposed", ())]
        pattern = NMPattern.parse(report["modifier"]["mask_structure"])
        return Promise(pruned, pattern, transposed)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record of a run: {error!r}") from error
