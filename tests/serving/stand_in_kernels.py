# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the sparse kernels, which no CPU has: packed for true, multiplied dense."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from nm_permute_plugin.serving import accelerate, linear
from nm_permute_plugin.serving.kernel_table import Bucket, Choice, KernelTable
from nm_permute_plugin.serving.kernels.dense import Dense
from nm_permute_plugin.serving.kernels.kernel import DTYPES_8, Settings, output_dtype
from nm_permute_plugin.serving.kernels.packing import pack, unpack
from nm_permute_plugin.serving.kernels.triton_fallback import TritonDecode
from nm_permute_plugin.serving.ops import KERNELS, TABLES


@dataclass(frozen=True)
class StandIn(TritonDecode):
    """Packs like our own kernels, and multiplies by the unpacked weight as torch does."""

    name: str = "triton"

    def unsupported(self, weight: Tensor) -> str | None:
        return None

    def prepare(self, weight: Tensor) -> Tensor:
        return pack(weight) if weight.dtype in DTYPES_8 else super().prepare(weight)

    def unpack(
        self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        if dtype in DTYPES_8:
            return unpack(packed, shape, dtype)
        return super().unpack(packed, shape, dtype)

    def run(self, packed: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        weight = self.unpack(packed, (rows, x.shape[1]), x.dtype)
        if x.dtype in DTYPES_8:
            return (x.float() @ weight.float().t()).to(output_dtype(x.dtype))
        return torch.nn.functional.linear(x, weight)


@contextmanager
def stand_in_kernels(*names: str) -> Iterator[None]:
    """
    Let 2:4 weights on a CPU be packed, and multiplied by stand-ins.

    :param names: the kernels that the tables choose, for more and more tokens: ``triton``
        and ``cusparselt`` are stand-ins, ``dense`` is itself
    """
    chosen = names or ("triton",)
    stand_ins = {name: StandIn(name) for name in chosen if name != "dense"}

    def table(weight: Tensor, allowed: list[str]) -> KernelTable:
        choices = [Choice(name, (), 1.0) for name in chosen]
        sizes = [4**index for index in range(len(choices))]
        buckets = [Bucket(n, c, [c]) for n, c in zip(sizes, choices, strict=True)]
        return KernelTable(len(weight), buckets)

    with (
        patch.dict(KERNELS, {**stand_ins, "dense": Dense()}),
        patch.dict(TABLES, clear=True),
        patch.object(linear, "_table", table),
        patch.object(linear, "_unsupported", lambda weight, mode: None),
        patch.object(accelerate, "expect", lambda weight, mode: False),
    ):
        yield
