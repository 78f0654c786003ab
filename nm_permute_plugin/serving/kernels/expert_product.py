# SPDX-License-Identifier: Apache-2.0
"""The shapes of blocks of ``experts24.cu``, and the compiled kernels of experts."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels import mma_sp, nvidia
from nm_permute_plugin.serving.kernels.kernel import Settings

KINDS = {torch.bfloat16: 0, torch.float16: 1}

_PITCH = 36
"""A token's sums in shared memory are this many floats apart: no bank conflicts."""


class ProductShape(NamedTuple):
    """How a block of threads works; ``experts24.cu`` explains the words."""

    gated: int
    tiles: int
    warps_n: int
    warps_k: int
    depth: int

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return 32 * self.warps_n * self.warps_k

    @property
    def shared_bytes(self) -> int:
        """The bytes of shared memory that a launch asks for, for sums."""
        return self.warps_n * self.warps_k * 8 * self.tiles * _PITCH * 4

    def row_blocks(self, rows: int) -> int:
        """Return how many blocks there are side by side in rows of the output."""
        return -(-rows // (32 * self.warps_n // (1 + self.gated)))

    def macros(self, kind: int) -> dict[str, int]:
        """Return what the source is compiled for."""
        macros = {name.upper(): value for name, value in self._asdict().items()}
        return macros | {"KIND": kind, "PITCH": _PITCH}


class ExpertSettings(NamedTuple):
    """
    How both products of experts run.

    :param tiles: a slot is of 8 pairs times this
    :param direct: whether each block finds its pairs itself; else they are sorted first
    :param up: the first product's ``warps_n``, ``warps_k`` and ``depth``
    :param down: the second one's
    """

    tiles: int
    direct: int
    up: Settings
    down: Settings

    def flat(self) -> Settings:
        """Return all numbers in a row, as kernel tables keep them."""
        return (self.tiles, self.direct, *self.up, *self.down)

    @classmethod
    def of(cls, flat: Settings) -> "ExpertSettings":
        """Return the settings that ``flat`` has made a row of."""
        tiles, direct, *shapes = flat
        return cls(tiles, direct, tuple(shapes[:3]), tuple(shapes[3:]))

    def shapes(self) -> tuple[ProductShape, ProductShape]:
        """Return the shapes of both products."""
        up = ProductShape(1, self.tiles, *self.up)
        return up, ProductShape(0, self.tiles, *self.down)


def function(name: str, x: Tensor, shape: ProductShape | None) -> nvidia.Function:
    """
    Return a kernel of experts, compiled for the card and the dtype of some tokens.

    :param shape: for the product; None for the kernels of ``experts.cu``
    """
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(x.device))
    return _function(name, architecture, KINDS[x.dtype], shape, x.device.index)


def code_of(architecture: str, kind: int, shape: ProductShape | None) -> bytes:
    """
    Compile a source for a card, or read what was compiled before.

    :raises RuntimeError: if it does not compile
    """
    if shape is None:
        none = ("tiles", "warps_n", "warps_k", "depth", "pitch")
        macros = {"KIND": kind, **{name.upper(): 1 for name in none}}
        return mma_sp.compiled("experts.cu", architecture, macros)
    return mma_sp.compiled("experts24.cu", architecture, shape.macros(kind))


@lru_cache(maxsize=256)
def _function(
    name: str, architecture: str, kind: int, shape: ProductShape | None, device: int
) -> nvidia.Function:
    with torch.cuda.device(device):
        code = code_of(architecture, kind, shape)
        return nvidia.Function(code, name, shape.shared_bytes if shape else 0)
