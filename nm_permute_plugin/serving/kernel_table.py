# SPDX-License-Identifier: Apache-2.0
"""The kernel table of a weight's shape, which says what multiplies how many tokens."""

import json
import logging
import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nm_permute_plugin._files import parse_json, read_text
from nm_permute_plugin.serving import cache
from nm_permute_plugin.serving import kernels as implementations
from nm_permute_plugin.serving.kernels.kernel import Settings

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

BUCKETS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""The most tokens that each bucket serves; the last bucket also serves larger numbers."""

_LARGEST_SETTING = 1 << 16  # sizes of tiles, counts, numbers of algorithms; -1: none
_LARGEST = 1 << 20  # bytes of a file: a table takes some kilobytes


class Choice(NamedTuple):
    """
    A kernel and its tuned settings for some number of tokens.

    :param microseconds: the measured time of one product
    """

    kernel: str
    settings: Settings
    microseconds: float


class Bucket(NamedTuple):
    """
    The choice for products of up to ``tokens`` tokens.

    :param chosen: the kernel that runs
    :param fastest: the best choice of every kernel, for the log
    """

    tokens: int
    chosen: Choice
    fastest: list[Choice]


@dataclass(frozen=True)
class KernelTable:
    """
    The kernels for one shape and dtype of weight, by number of tokens.

    :param out_features: rows of the weight
    :param buckets: one or more, by ascending number of tokens
    """

    out_features: int
    buckets: list[Bucket]

    @cached_property
    def kernels(self) -> list[str]:
        """The kernels that some bucket chooses: a layer keeps a packed weight for each."""
        return sorted({bucket.chosen.kernel for bucket in self.buckets})

    def choice(self, tokens: int) -> Choice:
        """Return what multiplies this many tokens."""
        index = bisect_left(self._sizes, tokens)
        return self.buckets[min(index, len(self.buckets) - 1)].chosen

    @cached_property
    def _sizes(self) -> list[int]:
        return [bucket.tokens for bucket in self.buckets]

    def as_text(self) -> str:
        """Write a line for each bucket: microseconds of every kernel, and the choice."""
        names = sorted({choice.kernel for b in self.buckets for choice in b.fastest})
        lines = ["tokens".rjust(8) + "".join(name.rjust(12) for name in names)]
        for bucket in self.buckets:
            times = {c.kernel: f"{c.microseconds:.1f}" for c in bucket.fastest}
            cells = "".join(times.get(name, "-").rjust(12) for name in names)
            lines.append(f"{bucket.tokens:8d}{cells}  {bucket.chosen.kernel}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Write the table as JSON, which ``from_json`` reads."""
        stored = {"out_features": self.out_features, "buckets": self.buckets}
        return json.dumps(stored, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "KernelTable":
        """
        Read what ``to_json`` wrote.

        :raises ValueError: if the text is no kernel table
        """
        try:
            stored = parse_json(text)
            buckets = [
                Bucket(
                    int(tokens), _choice(chosen), [_choice(each) for each in fastest]
                )
                for tokens, chosen, fastest in stored["buckets"]
            ]
            table = cls(int(stored["out_features"]), buckets)
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"it is no kernel table: {error!r}") from None
        sizes = table._sizes
        if not sizes or sizes != sorted(set(sizes)):
            raise ValueError(f"it is no kernel table: its buckets are {sizes}")
        return table


def _choice(stored: list[Any]) -> Choice:
    kernel, settings, microseconds = stored
    numbers = all(type(n) is int and -1 <= n <= _LARGEST_SETTING for n in settings)
    if not numbers or not 0 <= float(microseconds) < float("inf"):
        raise ValueError(f"it is no kernel table: it holds {str(stored)[:80]}")
    return Choice(str(kernel), tuple(settings), float(microseconds))


def path_of(weight: Tensor, kernels: list[str]) -> Path:
    """
    Return the file of a weight's kernel table, which is named by all that it depends on.

    :param kernels: the names of the kernels that may be chosen
    """
    card = torch.cuda.get_device_name(weight.device)
    shape = "x".join(str(size) for size in weight.shape)
    dtype = str(weight.dtype).removeprefix("torch.")
    versions = (torch.__version__, str(torch.backends.cusparselt.version()))
    source = source_digest(files(implementations))
    key = (card, *versions, shape, dtype, " ".join(kernels), source)
    readable = re.sub(r"[^A-Za-z0-9]+", "-", f"{card}-{shape}-{dtype}")
    digest = sha256("\n".join(key).encode()).hexdigest()[:16]
    return cache.folder() / f"{readable}-{digest}.json"


def source_digest(folder: Traversable) -> str:
    """Hash the source in a folder and its subfolders: a change invalidates what is kept."""
    found = sha256()
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith((".py", ".cu", ".cuh")):
            content = file.read_bytes()
            found.update(f"{file.name} {len(content)}\n".encode() + content)
        elif file.is_dir() and file.name != "__pycache__":
            found.update(f"{file.name}/ {source_digest(file)}\n".encode())
    return found.hexdigest()


def load(path: Path, rows: int, allowed: list[str]) -> KernelTable | None:
    """
    Read a kernel table; None if there is none.

    A damaged table, or one of other rows or kernels, is ignored with a warning.
    """
    try:
        table = KernelTable.from_json(read_text(path, _LARGEST))
        if table.out_features != rows or not set(table.kernels) <= set(allowed):
            raise ValueError(f"it is for {table.out_features} rows, {table.kernels}")
        return table
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("ignored the kernel table in %s: %s", path, error)
        return None


def save(table: KernelTable, path: Path) -> None:
    """Write a kernel table as a whole or not at all; a failure is only warned of."""
    cache.keep(path, table.to_json().encode(), "kernel table")
