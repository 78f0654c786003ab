# SPDX-License-Identifier: Apache-2.0
"""Makes the helpers beside these tests importable; sparse models of transformers."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from loguru import logger
from torch import nn
from transformers import PreTrainedModel

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern

sys.path.insert(0, str(Path(__file__).parent))
from stand_in_kernels import stand_in_kernels  # noqa: E402


@pytest.fixture
def sparse_model(tiny_model) -> Callable[..., PreTrainedModel]:
    """A factory: a tiny model whose linears are 2:4, all but the head."""

    def make(architecture: str = "llama", **options: object) -> PreTrainedModel:
        model = tiny_model(architecture, dtype=torch.bfloat16, **options)
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight.data
                mask = nm_mask(weight.abs().float(), NMPattern(2, 4))
                weight.masked_fill_(~mask, 0)
        return model

    return make


@pytest.fixture
def kernels() -> Iterator[None]:
    """A stand-in for Triton's kernels, as there is no card."""
    with stand_in_kernels("triton"):
        yield


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the log says."""
    found: list[str] = []
    number = logger.add(lambda message: found.append(message.record["message"]))
    yield found
    logger.remove(number)
