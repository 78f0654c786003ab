# SPDX-License-Identifier: Apache-2.0
"""Our CUDA kernel for few tokens: it feeds packed weights to the sparse tensor cores."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

from nm_permute_plugin.serving import cache
from nm_permute_plugin.serving.kernels import nvidia
from nm_permute_plugin.serving.kernels.kernel import (
    Settings,
    output_dtype,
    unsupported_card,
    unsupported_dtype,
)
from nm_permute_plugin.serving.kernels.packing import CHANNELS, ROWS, pack, unpack

MOST_TOKENS = 64
"""The kernel multiplies at most this many tokens."""

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float8_e4m3fn: 2, torch.int8: 3}
_PITCH = 36
"""A token's sums in shared memory are this many floats apart: no bank conflicts."""

# Block shapes without their tiles, of at most 16 warps: with more tokens each warp needs
# more registers, so that fewer warps fit.
_FEW = [(1, 16, 1, 1), (1, 8, 1, 1), (2, 8, 1, 1), (1, 16, 1, 2),
        (1, 8, 1, 4), (2, 4, 1, 4), (1, 8, 2, 2)]  # fmt: skip
_MANY = [(1, 8, 1, 0), (1, 8, 1, 1), (2, 4, 1, 0), (2, 4, 1, 1),
         (1, 8, 1, 4), (2, 4, 1, 4)]  # fmt: skip
_BLOCK_SHAPES = {1: _FEW, 2: _FEW, 4: _MANY, 8: _MANY}
# Block shapes for wgmma.
_STAGED = [(8, 1, 1, 1, 3), (8, 1, 2, 1, 3), (8, 1, 4, 1, 3), (8, 1, 8, 1, 3),
           (12, 1, 8, 1, 3), (4, 1, 8, 1, 3), (4, 2, 1, 1, 3)]  # fmt: skip
_STAGED_TILES = 4
"""wgmma is tried from this many tiles of 8 tokens on."""


class BlockShape(NamedTuple):
    """How a block of threads works; ``sparse24.cu`` explains the words."""

    tiles: int
    warps_n: int
    warps_k: int
    cluster: int
    depth: int
    stages: int = 0

    def architecture(self, capability: tuple[int, int]) -> str:
        """Return the architecture to compile for, such as ``sm_90``."""
        own = "a" if self.stages else ""  # wgmma exists on this one architecture only
        return "sm_{}{}".format(*capability) + own

    def shared_bytes(self, kind: int) -> int:
        """Return the bytes that a launch asks for: chunks and tokens, later the sums."""
        width, tokens = 2 if kind < 2 else 1, 8 * self.tiles
        chunk = ROWS * CHANNELS * 9 // 8 if kind < 2 else ROWS * CHANNELS * 5 // 8
        ahead = self.depth if self.depth > 1 else 0
        ring = self.warps_n * self.warps_k * ahead * chunk
        staged = self.stages * self.warps_k * tokens * CHANNELS * width
        sums = self.warps_n * self.warps_k * tokens * _PITCH * 4
        return max(ring + staged, sums)

    def fits(self, kind: int, card: nvidia.Card) -> bool:
        """Whether a block has enough shared memory on a card, its barriers included."""
        barriers = self.warps_n * self.warps_k * self.depth if self.depth > 1 else 0
        return self.shared_bytes(kind) + 8 * barriers <= card.shared_bytes


def block_shapes(tiles: int, kind: int, card: nvidia.Card) -> list[BlockShape]:
    """
    List the block shapes worth trying for up to ``8 * tiles`` tokens.

    Capability 9.0 and later has clusters and the copy engine, 9.0 alone has wgmma.
    """
    enough = min(known for known in _BLOCK_SHAPES if known >= tiles)
    found = [BlockShape(enough, *shape) for shape in _BLOCK_SHAPES[enough]]
    if card.capability < (9, 0):
        found = [shape for shape in found if shape.cluster == 1 and shape.depth < 2]
    elif card.capability == (9, 0) and kind < 2 and enough >= _STAGED_TILES:
        found += [BlockShape(enough, *shape) for shape in _STAGED]
    return [shape for shape in found if shape.fits(kind, card)]


@dataclass(frozen=True)
class MmaSp:
    """Our CUDA kernel on the sparse tensor cores, for at most 64 tokens."""

    name: str = "mma_sp"

    def unsupported(self, weight: Tensor) -> str | None:
        rows, channels = weight.shape
        if reason := unsupported_dtype(weight.dtype, _KINDS):
            return reason
        if reason := unsupported_card(weight):
            return reason
        if rows % ROWS or channels % CHANNELS:
            return f"{rows} x {channels} is no multiple of {ROWS} x {CHANNELS}"
        return None

    def prepare(self, weight: Tensor) -> Tensor:
        return pack(weight)

    def unpack(
        self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        return unpack(packed, shape, dtype)

    def candidates(self, packed: Tensor, x: Tensor, rows: int) -> list[Settings]:
        tokens = len(x)
        if tokens > MOST_TOKENS:
            return []
        found = _shapes(x, tokens)
        with ThreadPoolExecutor() as pool:  # the compiler releases the GIL
            list(pool.map(lambda shape: _machine_code(*_key(x, shape)), found))
        return [tuple(shape) for shape in found]

    def takes(self, weight: Tensor, tokens: int, settings: Settings) -> bool:
        return tokens <= MOST_TOKENS and settings in _shapes(weight, tokens)

    def run(self, packed: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        shape = BlockShape(*settings)
        x = x.contiguous()
        out = x.new_empty(len(x), rows, dtype=output_dtype(x.dtype))
        blocks = -(-rows // (ROWS * shape.warps_n))
        _function(*_key(x, shape), x.device.index)(
            (blocks, shape.cluster),
            32 * shape.warps_n * shape.warps_k,
            [packed, x, out, len(x), rows, packed.shape[1]],
        )
        return out


def _shapes(x: Tensor, tokens: int) -> list[BlockShape]:
    """List the block shapes for tokens of a dtype on their card."""
    return block_shapes(-(-tokens // 8), _KINDS[x.dtype], nvidia.card_of(x.device))


def _key(x: Tensor, shape: BlockShape) -> tuple[str, int, BlockShape]:
    capability = torch.cuda.get_device_capability(x.device)
    return shape.architecture(capability), _KINDS[x.dtype], shape


def _machine_code(architecture: str, kind: int, shape: BlockShape) -> bytes:
    macros = {name.upper(): value for name, value in shape._asdict().items()}
    macros |= {"KIND": kind, "PITCH": _PITCH}
    return compiled("sparse24.cu", architecture, macros)


def compiled(name: str, architecture: str, macros: dict[str, int]) -> bytes:
    """
    Compile a kernel's source, or read what was compiled before.

    :param name: a file beside this one
    :param architecture: such as ``sm_90``
    :param macros: preprocessor definitions by name
    :raises RuntimeError: if it does not compile
    """
    return _compiled(name, architecture, tuple(sorted(macros.items())))


@lru_cache(maxsize=512)
def _compiled(
    name: str, architecture: str, macros: tuple[tuple[str, int], ...]
) -> bytes:
    source = source_of(name)
    key = (source, architecture, macros, nvidia.compiler_version())
    file = f"{architecture}-{sha256(repr(key).encode()).hexdigest()[:32]}.cubin"
    return cache.machine_code(
        file, lambda: nvidia.compile_source(source, architecture, dict(macros))
    )


@lru_cache(maxsize=256)
def _function(
    architecture: str, kind: int, shape: BlockShape, device: int
) -> nvidia.Function:
    with torch.cuda.device(device):
        code = _machine_code(architecture, kind, shape)
        return nvidia.Function(code, "sparse24", shape.shared_bytes(kind))


@lru_cache(maxsize=8)
def source_of(name: str) -> str:
    """Read a kernel's source, in CUDA C++, with what such kernels share before it."""
    folder = files(__package__)
    return (folder / "mma_sp.cuh").read_text() + (folder / name).read_text()
