# SPDX-License-Identifier: Apache-2.0
"""Cards that the kernels are compiled for, and a weight on one that is not here."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nm_permute_plugin.serving.kernels.nvidia import Card

CARDS = {
    "sm_80": Card((8, 0), 163 << 10),  # A100
    "sm_86": Card((8, 6), 99 << 10),  # A10, RTX 30
    "sm_89": Card((8, 9), 99 << 10),  # L4, L40, RTX 40
    "sm_90": Card((9, 0), 227 << 10),  # H100, H200
    "sm_100": Card((10, 0), 227 << 10),  # B200
    "sm_120": Card((12, 0), 99 << 10),  # RTX 50, RTX PRO Blackwell
}
"""Cards with the shared memory of a block, as CUDA's programming guide has it."""

FEW_CARDS = ("sm_80", "sm_100", "sm_120")
"""Where kernels that do not serve are compiled: sm_90 ran them, the others are alike."""


@contextmanager
def weight_on(
    card: Card, dtype: torch.dtype, shape: tuple[int, int] = (4096, 4096)
) -> Iterator[Tensor]:
    """
    A weight without values on a card; CUDA's answers about the card are stand-ins.
    """
    found = SimpleNamespace(
        major=card.capability[0],
        minor=card.capability[1],
        shared_memory_per_multiprocessor=card.shared_bytes + 1024,
    )
    with (
        patch.object(torch.cuda, "get_device_capability", lambda _: card.capability),
        patch.object(torch.cuda, "get_device_properties", lambda _: found),
        patch.object(torch.backends.cusparselt, "is_available", lambda: True),
        FakeTensorMode(),
    ):
        yield torch.empty(shape, dtype=dtype, device="cuda")
