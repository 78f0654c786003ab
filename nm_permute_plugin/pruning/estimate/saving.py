# SPDX-License-Identifier: Apache-2.0
"""What a save takes: some weights are written, checked, stored sparse, and hashed."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nm_permute_plugin.checkpoint.codec import compress
from nm_permute_plugin.checkpoint.pattern import examine
from nm_permute_plugin.checkpoint.plan import TWO_FOUR
from nm_permute_plugin.pruning.estimate.meter import Meter, Took
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.conv1d import is_transposed, weight_of

SAMPLE = 1 << 25
"""Bytes of weights that are written."""


def saving(
    model: nn.Module,
    prunable: Sequence[str],
    masks: Mapping[str, Tensor],
    settings: Settings,
    folder: Path | None,
    meter: Meter,
) -> Took:
    """
    Measure a save of some of the weights, counted for all.

    :param folder: in which the checkpoint's folder will lie; the file that is written there
        has no name, and is gone at once
    """
    sample: list[Tensor] = []
    for name in prunable:
        weight = weight_of(model.get_submodule(name))
        mask = masks[name].to(weight.device)
        sample.append(weight.masked_fill(~mask, 0) if settings.prune else weight)
        if sum(tensor.nbytes for tensor in sample) >= SAMPLE:
            break
    transposed = any(is_transposed(model.get_submodule(name)) for name in prunable)
    sparse = settings.prune and settings.pattern == TWO_FOUR and not transposed
    sparse &= settings.format in ("auto", "sparse-24-bitmask")

    def run() -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            stored = [tensor.cpu() for tensor in sample]
            _write(file.fileno(), stored)
            file.seek(0)
            file.read()
            for tensor in stored:
                examine(tensor, settings.pattern)
            if sparse:
                parts = [compress(tensor) for tensor in stored]
                stored = [x for p in parts for x in (p.compressed, p.bitmask)]
                _write(file.fileno(), stored)
                file.seek(0)
                file.read()
            for block in _bytes(stored):
                hashlib.sha256(block).digest()

    _, took = meter.took(run)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return took * (whole / max(1, sum(tensor.nbytes for tensor in sample)))


def _write(descriptor: int, tensors: Sequence[Tensor]) -> None:
    for block in _bytes(tensors):
        os.write(descriptor, block)
    os.fsync(descriptor)


def _bytes(tensors: Sequence[Tensor]) -> Iterator[memoryview]:
    for tensor in tensors:
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        yield flat.numpy().data
