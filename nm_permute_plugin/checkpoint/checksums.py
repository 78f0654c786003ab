# SPDX-License-Identifier: Apache-2.0
"""Hold the SHA-256 of every file of a checkpoint, which ties the files together."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from nm_permute_plugin._files import open_file
from nm_permute_plugin.checkpoint.directory import INDEX, read_json
from nm_permute_plugin.checkpoint.record import FOLDER
from nm_permute_plugin.checkpoint.shards import DamagedError

FILE = f"{FOLDER}/checksums.json"
"""Names the file that holds the checksums; transformers does not save it again."""

_DESCRIBING = (
    "config.json",
    INDEX,
    f"{FOLDER}/report.json",
    f"{FOLDER}/permutations.safetensors",
)
_THREADS = 4  # that read files at the same time
_ALGORITHM = "sha256"


def write_checksums(folder: Path, weights: Iterable[str]) -> None:
    """
    Writes ``nm_permute/checksums.json``: weights, their index, config and record.

    The model card and files that others add are left out, so that they can change.

    :param weights: the names of the weight files
    """
    names = [*weights, *(name for name in _DESCRIBING if (folder / name).is_file())]
    (folder / FOLDER).mkdir(exist_ok=True)
    files = dict(zip(names, digests(folder, names), strict=True))
    content = {"algorithm": _ALGORITHM, "files": files}
    text = json.dumps(content, indent=1) + "\n"
    (folder / FILE).unlink(missing_ok=True)  # it may be linked to an older one
    (folder / FILE).write_text(text, encoding="utf-8")


def find_changes(folder: Path, below: str = "") -> dict[str, str] | None:
    """
    Reads every file of a checkpoint, and says what is not as it was written, by file.

    :param below: look at files of this subfolder alone
    :return: None where the checkpoint has no checksums
    """
    if not os.path.lexists(folder / FILE):
        return None
    try:
        content = read_json(folder / FILE)
    except DamagedError as error:
        return {FILE: error.reason}
    files, algorithm = content.get("files"), content.get("algorithm")
    if algorithm != _ALGORITHM or not isinstance(files, dict) or not files:
        return {FILE: f"holds no checksums: its algorithm is {algorithm!r}"}
    for name in files:
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            return {FILE: f"names {name!r}, which is not in this folder"}
    files = {name: of for name, of in files.items() if name.startswith(below)}
    found = digests(folder, files)
    return {
        name: f"is missing, and {FILE} names it"
        if digest is None
        else "is not the file that was written with the others (SHA-256): it is "
        "damaged, changed, or of another run. Fetch or make the checkpoint again; if you "
        f"changed it yourself, delete {FILE}"
        for (name, expected), digest in zip(files.items(), found, strict=True)
        if digest != expected
    }


def refuse_changed(folder: Path, below: str = "") -> None:
    """
    Checks that a checkpoint is as it was written, where it has checksums.

    :param below: look at files of this subfolder alone
    :raises DamagedError: at the first file that is not
    """
    for name, message in (find_changes(folder, below) or {}).items():
        raise DamagedError(folder / name, message)


def digests(folder: Path, names: Iterable[str]) -> list[str | None]:
    """Returns the SHA-256 of files in hexadecimal; None of one that cannot be read."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_digest, (folder / name for name in names)))


def _digest(path: Path) -> str | None:
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, _ALGORITHM).hexdigest()
    except (OSError, ValueError):  # no file can have such a name
        return None
