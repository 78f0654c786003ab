# SPDX-License-Identifier: Apache-2.0
"""Which kernel multiplies how many tokens, for one shape of weight; kept on disk."""

import json
import logging
import os
import re
import tempfile
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

from nm_permute_plugin.serving import kernels as implementations
from nm_permute_plugin.serving.kernels.kernel import Settings

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

BUCKETS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""The most tokens of each bucket; the last one also serves any more."""

CACHE = "NM_PERMUTE_CACHE"


class Way(NamedTuple):
    """
    A kernel as tuned for some number of tokens.

    :param microseconds: of one call, as measured
    """

    kernel: str
    settings: Settings
    microseconds: float


class Bucket(NamedTuple):
    """
    Products of up to ``tokens`` tokens.

    :param chosen: what runs
    :param fastest: the best that every kernel reached, for the table
    """

    tokens: int
    chosen: Way
    fastest: list[Way]


@dataclass(frozen=True)
class Plan:
    """
    The kernels for one shape and dtype of weight, by number of tokens.

    :param out_features: rows of the weight
    """

    out_features: int
    buckets: list[Bucket]

    @cached_property
    def kernels(self) -> list[str]:
        """The kernels that run at some number of tokens: their forms are kept."""
        return sorted({bucket.chosen.kernel for bucket in self.buckets})

    def way(self, tokens: int) -> Way:
        """What multiplies so many tokens."""
        index = bisect_left(self._sizes, tokens)
        return self.buckets[min(index, len(self.buckets) - 1)].chosen

    @cached_property
    def _sizes(self) -> list[int]:
        return [bucket.tokens for bucket in self.buckets]

    def table(self) -> str:
        """A line a bucket: microseconds of every kernel, and the chosen one."""
        names = sorted({way.kernel for b in self.buckets for way in b.fastest})
        lines = ["tokens".rjust(8) + "".join(name.rjust(12) for name in names)]
        for bucket in self.buckets:
            times = {way.kernel: f"{way.microseconds:.1f}" for way in bucket.fastest}
            cells = "".join(times.get(name, "-").rjust(12) for name in names)
            lines.append(f"{bucket.tokens:8d}{cells}  {bucket.chosen.kernel}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as text; ``from_json`` reads it."""
        stored = {"out_features": self.out_features, "buckets": self.buckets}
        return json.dumps(stored, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """
        The plan that was written.

        :raises ValueError: if the text is no plan
        """
        try:
            stored = json.loads(text)
            buckets = [
                Bucket(int(tokens), _way(chosen), [_way(way) for way in fastest])
                for tokens, chosen, fastest in stored["buckets"]
            ]
            return cls(int(stored["out_features"]), buckets)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no plan of kernels: {error}") from None


def _way(stored: list[Any]) -> Way:
    kernel, settings, taken = stored
    return Way(str(kernel), tuple(int(number) for number in settings), float(taken))


class Key(NamedTuple):
    """All that a plan depends on."""

    card: str
    torch: str
    cusparselt: str
    shape: str
    dtype: str
    kernels: str
    source: str

    @property
    def path(self) -> Path:
        """The plan's file."""
        readable = re.sub(
            r"[^A-Za-z0-9]+", "-", f"{self.card}-{self.shape}-{self.dtype}"
        )
        digest = sha256("\n".join(self).encode()).hexdigest()[:16]
        return cache_folder() / f"{readable}-{digest}.json"


def key_of(weight: Tensor, kernels: list[str]) -> Key:
    """
    The key of a weight's plan.

    :param kernels: the names of those that may be chosen
    """
    version = torch.backends.cusparselt.version()
    return Key(
        card=torch.cuda.get_device_name(weight.device),
        torch=torch.__version__,
        cusparselt=str(version),
        shape="x".join(str(size) for size in weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        kernels=" ".join(kernels),
        source=digest(files(implementations)),
    )


def digest(folder: Traversable) -> str:
    """A hash of the source in a folder: what was changed is measured or compiled anew."""
    found = sha256()
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith((".py", ".cu")):
            content = file.read_bytes()
            found.update(f"{file.name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def cache_folder() -> Path:
    """``NM_PERMUTE_CACHE``, or ``nm-permute`` in the user's cache folder."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nm-permute"


def load(path: Path) -> Plan | None:
    """The plan in a file, or None; a damaged one is ignored with a warning."""
    try:
        return Plan.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("ignored the plan of kernels in %s: %s", path, error)
        return None


def save(plan: Plan, path: Path) -> None:
    """Write a plan as a whole or not at all; a failure is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False
        ) as file:
            file.write(plan.to_json())
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("the plan of kernels is not kept in %s: %s", path, error)
