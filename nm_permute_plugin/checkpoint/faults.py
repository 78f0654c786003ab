# SPDX-License-Identifier: Apache-2.0
"""Find what is wrong with single tensors and files of a checkpoint."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nm_permute_plugin.checkpoint.config import (
    SparsityConfig,
    quantization_format,
    weight_schemes,
)
from nm_permute_plugin.checkpoint.directory import (
    INDEX,
    SINGLE,
    Checkpoint,
    index_of,
    is_file_name,
)
from nm_permute_plugin.checkpoint.pattern import comparable
from nm_permute_plugin.checkpoint.prunable import packed_experts
from nm_permute_plugin.checkpoint.shards import DamagedError, open_shard
from nm_permute_plugin.maths.pattern import NMPattern


@dataclass(frozen=True)
class Fault:
    """Says what is wrong, and where; ``tensor`` is empty if a whole file is meant."""

    file: str
    tensor: str
    message: str


def storage_faults(
    stored: str, sparsity: SparsityConfig | None, declared: bool
) -> Iterator[str]:
    """
    Finds where a matrix is not stored as config.json says.

    :param stored: how it is stored
    :param declared: whether config.json, or the caller, says that it is sparse
    """
    if sparsity is None:
        return  # said once, of all matrices
    if stored != "dense" and sparsity.format != stored:
        yield f"is stored as {stored}, config.json says {sparsity.format}"
    elif stored != "dense" and not declared:
        yield f"is stored as {stored}, config.json does not say that it is sparse"
    elif declared and stored != sparsity.format:
        yield f"is stored {stored}, config.json says {sparsity.format}"


def weight_faults(checkpoint: Checkpoint, module: str, weight: Tensor) -> Iterator[str]:
    """Finds values that are none, and scales that do not belong to the weight."""
    if not bool(torch.isfinite(comparable(weight)).all()):
        yield "holds NaN or infinity"
    scale = f"{module}.weight_scale"
    if weight.dtype.itemsize == 1 and scale not in checkpoint.where:
        yield f"is {weight.dtype}, and there is no {scale}"
    elif weight.dtype.itemsize == 1:
        shape = checkpoint.where[scale].tensors[scale].shape
        if shape not in _scale_shapes(checkpoint, *weight.shape):
            yield f"has the shape {list(weight.shape)}, and {scale} {list(shape)}"


def forgotten(checkpoint: Checkpoint, sparsity: SparsityConfig | None) -> list[Fault]:
    """Says once, of all matrices, what config.json says nothing of."""
    faults = []
    stored = [s for s in checkpoint.formats.values() if s != "dense"]
    if stored and sparsity is None:
        message = (
            f"says nothing of the {len(stored)} matrices that are stored as {stored[0]}: "
            "take the config.json that the checkpoint came with, or write it again with "
            "`nm-permute convert FOLDER OUT`, which reads it by its tensors"
        )
        faults.append(Fault("config.json", "", message))
    if quantization_format(checkpoint.config) is None:
        narrow = [
            dtype
            for dtype in (_dtype(checkpoint, name) for name in checkpoint.matrices())
            if dtype is not None and dtype.itemsize == 1
        ]
        if narrow:
            message = (
                f"says nothing of quantization, and {len(narrow)} matrices are "
                f"{narrow[0]}: take the config.json that the checkpoint came with"
            )
            faults.append(Fault("config.json", "", message))
    return faults


def _dtype(checkpoint: Checkpoint, module: str) -> torch.dtype | None:
    """Returns the dtype of a matrix; None where it is damaged, which is its own fault."""
    try:
        return checkpoint.dense_layout(module)[0]
    except DamagedError:
        return None


def _scale_shapes(
    checkpoint: Checkpoint, rows: int, columns: int
) -> set[tuple[int, ...]]:
    """Lists the shapes of scales: of a matrix, of its rows, of groups, or of blocks."""
    shapes: set[tuple[int, ...]] = {(), (1,), (1, 1), (rows,), (rows, 1)}
    for scheme in weight_schemes(checkpoint.config):
        match scheme.get("group_size"), scheme.get("block_structure"):
            case int(size), _ if size > 0:
                shapes.add((rows, -(-columns // size)))
            case _, [int(high), int(wide)] if min(high, wide) > 0:
                shapes.add((-(-rows // high), -(-columns // wide)))
    return shapes


def other_faults(checkpoint: Checkpoint) -> Iterator[Fault]:
    """Finds the faults of tensors that are no matrices: scales, norms, biases."""
    matrices = set(checkpoint.matrices())
    for name, shard in checkpoint.where.items():
        module, _, part = name.rpartition(".")
        if module in matrices and part in ("weight", "compressed", "bitmask"):
            continue
        try:
            tensor = shard.read(name)
        except DamagedError as error:
            yield fault_of(error)
            continue
        if not tensor.is_floating_point():
            continue
        values = comparable(tensor)
        if not bool(torch.isfinite(values).all()):
            yield Fault(shard.path.name, name, "holds NaN or infinity")
        elif part.endswith("_scale") and not bool((values > 0).all()):
            yield Fault(shard.path.name, name, "holds a scale that is not positive")


def unexamined(
    checkpoint: Checkpoint, promised: Collection[str], pattern: NMPattern
) -> list[Fault]:
    """Says what a demanded pattern cannot be checked of."""
    faults = [
        Fault(
            checkpoint.where[name].path.name,
            name,
            f"holds the weights of all experts: only matrices are checked for {pattern}",
        )
        for name in packed_experts(checkpoint)
    ]
    if not promised and not faults:
        message = f"no linear of a layer is here that could be {pattern}"
        faults.append(Fault(checkpoint.path.name, "", message))
    return faults


def file_faults(path: Path) -> list[Fault]:
    """Lists every file that cannot be read, where the checkpoint could not be."""
    try:
        index = index_of(path)
    except DamagedError as error:
        return [fault_of(error)]
    named = {"": SINGLE} if index is None else index.get("weight_map")
    names = named.values() if isinstance(named, dict) else ()
    faults = []
    for file in sorted({name for name in names if is_file_name(name)}):
        if index is not None and not (path / file).exists():
            faults.append(Fault(file, "", f"does not exist, and {INDEX} names it"))
            continue
        try:
            open_shard(path / file)
        except DamagedError as error:
            faults.append(fault_of(error))
    return faults


def fault_of(error: DamagedError) -> Fault:
    return Fault(error.path.name, error.tensor, error.reason)
