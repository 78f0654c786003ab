# SPDX-License-Identifier: Apache-2.0
"""A Triton kernel for few tokens and 16-bit weights, where ``mma_sp`` does not run."""

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_permute_plugin.checkpoint.codec import clear_negative_zeros, compress
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.serving.kernels.kernel import (
    DTYPES_16,
    Settings,
    runs_triton,
    unsupported_card,
    unsupported_dtype,
)
from nm_permute_plugin.serving.kernels.packing import CODES, expand

MOST_TOKENS = 64
"""The kernel multiplies at most this many tokens."""

_TILES: list[Settings] = [(16, 128, 4, 3), (32, 64, 4, 3), (64, 32, 4, 4)]
"""Rows and groups of a tile, warps, pipeline stages: 58 KiB of shared memory at most."""


@dataclass(frozen=True)
class TritonDecode:
    """Our Triton kernel: it reads packed weights and expands them in registers."""

    name: str = "triton"

    def unsupported(self, weight: Tensor) -> str | None:
        if reason := unsupported_dtype(weight.dtype, DTYPES_16):
            return reason
        if reason := unsupported_card(weight):
            return reason
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if weight.shape[1] % 32:
            return f"{weight.shape[1]} channels are no multiple of 32"
        return None

    def prepare(self, weight: Tensor) -> Tensor:
        stored = compress(clear_negative_zeros(weight))
        codes = torch.tensor(CODES, dtype=torch.uint8, device=weight.device)
        bits = stored.bitmask.int()
        low, high = codes[bits & 15], codes[bits >> 4]
        values = stored.compressed.view(torch.uint8)
        return torch.cat((values, low | high << 4), -1)

    def unpack(
        self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        rows, channels = shape
        kept = packed[:, :channels].contiguous().view(WORDS[dtype])
        codes = packed[:, channels:].int()
        places = torch.stack((codes & 15, codes >> 4), -1).view(rows, -1)
        return expand(kept.view(rows, -1, 2), places).view(shape).view(dtype)

    def candidates(self, packed: Tensor, x: Tensor, rows: int) -> list[Settings]:
        if len(x) > MOST_TOKENS:
            return []
        return list(_TILES)

    def takes(self, weight: Tensor, tokens: int, settings: Settings) -> bool:
        return tokens <= MOST_TOKENS and settings in _TILES

    @runs_triton
    def run(self, packed: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        from nm_permute_plugin.serving.kernels.triton_decode import decode

        return decode(packed, x, rows, settings)
