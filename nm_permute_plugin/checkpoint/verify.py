# SPDX-License-Identifier: Apache-2.0
"""Find everything that is wrong with a checkpoint on disk."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nm_permute_plugin.checkpoint.config import (
    SparsityConfig,
    quantization_format,
    read_sparsity_config,
)
from nm_permute_plugin.checkpoint.directory import (
    INDEX,
    SINGLE,
    Checkpoint,
    open_checkpoint,
    read_json,
)
from nm_permute_plugin.checkpoint.packed import PACKED, packed_modules
from nm_permute_plugin.checkpoint.pattern import (
    Violation,
    comparable,
    examine,
    levels_of,
    read_stored,
)
from nm_permute_plugin.checkpoint.plan import is_embedding
from nm_permute_plugin.checkpoint.record import read_promise
from nm_permute_plugin.checkpoint.shards import DamagedError, open_shard
from nm_permute_plugin.maths.pattern import NMPattern


@dataclass(frozen=True)
class Row:
    """
    Describes a weight matrix of the checkpoint.

    :param format: dense, a sparse format, or packed: less than 8 bits a weight
    :param dtype: the dtype of what is stored, or of the levels where it is packed
    :param zeros: the share of its weights that are zero
    :param sparse: whether it follows the pattern
    :param promised: whether it should
    """

    module: str
    format: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    zeros: float
    sparse: bool
    promised: bool


@dataclass(frozen=True)
class Fault:
    """Says what is wrong, and where; ``tensor`` is empty if a whole file is meant."""

    file: str
    tensor: str
    message: str


@dataclass(frozen=True)
class Report:
    """
    Says what was found in a checkpoint.

    :param rows: its matrices, as far as they could be read
    :param faults: all that is wrong with it
    """

    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]

    @property
    def good(self) -> bool:
        """Tells whether nothing is wrong."""
        return not self.faults


def verify(
    path: Path | str,
    modules: Collection[str] | None = None,
    pattern: NMPattern | None = None,
) -> Report:
    """
    Reads a whole checkpoint, and compares it with what it says of itself.

    It checks the index against the files, headers, lengths and checksums of the
    files; dtypes, shapes and bitmasks of what is stored sparse; the N:M pattern of
    every promised module; that weights and scales are finite, and scales positive.

    :param modules: what must be sparse; None for what ``config.json`` promises, and the
        record of the run that pruned
    :param pattern: None for the one that is promised, or else 2:4
    """
    path = Path(path)
    try:
        sparsity = read_sparsity_config(read_json(path / "config.json"))
    except ValueError as error:
        return Report((), (Fault("config.json", "sparsity_config", str(error)),))
    try:
        checkpoint = open_checkpoint(path)
    except DamagedError as error:
        return Report((), _file_faults(path) or (_fault(error),))
    recorded = None
    if modules is None:
        try:
            recorded = read_promise(path)
        except ValueError as error:
            return Report((), (Fault("nm_permute/report.json", "", str(error)),))
    said = sparsity.pattern if sparsity else recorded and recorded.pattern
    declared = set(modules or ())
    if modules is None and sparsity is not None:
        try:
            declared = _declared(checkpoint, sparsity)
        except ValueError as error:
            return Report((), (Fault("config.json", "sparsity_config", str(error)),))
    asked = _Asked(
        sparsity,
        pattern or said or NMPattern(2, 4),
        declared,
        declared | set(recorded.modules if recorded else ()),
        set(recorded.transposed if recorded else ()),
    )
    matrices = dict.fromkeys(packed_modules(checkpoint), "packed")
    matrices |= {name: checkpoint.formats[name] for name in checkpoint.matrices()}
    faults = [
        Fault("config.json", name, "is said to be sparse, and has no weight")
        for name in sorted(asked.promised - set(checkpoint.formats) - set(matrices))
    ]
    rows = []
    for module, stored in matrices.items():
        row, found = _examine(checkpoint, module, stored, asked)
        rows += [row] if row else []
        faults += found
    faults += _other_faults(checkpoint)
    return Report(tuple(rows), tuple(faults))


@dataclass(frozen=True)
class _Asked:
    """
    Says what a checkpoint is held to.

    :param declared: the modules that config.json, or the caller, says are sparse
    :param promised: those, and the ones that the record of the run names
    """

    sparsity: SparsityConfig | None
    pattern: NMPattern
    declared: set[str]
    promised: set[str]
    transposed: set[str]


def _examine(
    checkpoint: Checkpoint, module: str, stored: str, asked: _Asked
) -> tuple[Row | None, list[Fault]]:
    """Reads a matrix; returns what it is, if it could be read, and its faults."""
    packed, declared = stored == "packed", module in asked.declared
    shard = checkpoint.where.get(f"{module}{PACKED}")
    file = (shard.path if packed and shard else checkpoint.file(module)).name
    try:
        weight = read_stored(checkpoint, module)
        # -0.0 does no harm where all zeros are stored
        clear = stored == "dense" and not declared
        levels = levels_of(checkpoint, module, weight, clear)
    except (DamagedError, NotImplementedError) as error:
        if isinstance(error, DamagedError) and not packed:
            return None, [_fault(error)]
        return None, [Fault(file, module, getattr(error, "reason", str(error)))]
    if module in asked.transposed:
        weight, levels = weight.t(), levels.t()
    found = examine(levels, asked.pattern)
    row = Row(
        module=module,
        format=stored,
        dtype=weight.dtype,
        shape=tuple(weight.shape),
        zeros=1 - int((comparable(levels) != 0).sum()) / max(1, levels.numel()),
        sparse=not isinstance(found, Violation),
        promised=module in asked.promised,
    )
    messages = []
    if row.promised and isinstance(found, Violation):
        messages.append(f"is not {asked.pattern}: {found}")
    if not packed:
        messages += _storage_faults(stored, asked.sparsity, declared)
        messages += _weight_faults(checkpoint, row, weight)
    return row, [Fault(file, module, message) for message in messages]


def _declared(checkpoint: Checkpoint, sparsity: SparsityConfig) -> set[str]:
    """Lists what config.json says is sparse; no class means embeddings."""
    targets = sparsity.targets
    named = {n for n in targets or () if "." in n and not n.startswith("re:")}
    found = {
        name
        for name in checkpoint.matrices()
        if sparsity.promises(name, "Embedding" if is_embedding(name) else "Linear")
        and not (targets is None and is_embedding(name))
    }
    return named - set(sparsity.ignore) | found


def _storage_faults(
    stored: str, sparsity: SparsityConfig | None, declared: bool
) -> Iterator[str]:
    if stored != "dense" and (sparsity is None or sparsity.format != stored):
        said = "nothing" if sparsity is None else sparsity.format
        yield f"is stored as {stored}, config.json says {said}"
    elif stored != "dense" and not declared:
        yield f"is stored as {stored}, config.json does not say that it is sparse"
    elif declared and sparsity is not None and stored != sparsity.format:
        yield f"is stored {stored}, config.json says {sparsity.format}"


def _weight_faults(checkpoint: Checkpoint, row: Row, weight: Tensor) -> Iterator[str]:
    if not bool(torch.isfinite(comparable(weight)).all()):
        yield "holds NaN or infinity"
    scale = f"{row.module}.weight_scale"
    if weight.dtype.itemsize == 1 and scale not in checkpoint.where:
        yield f"is {weight.dtype}, and there is no {scale}"
    elif weight.dtype.itemsize == 1:
        shape = checkpoint.where[scale].tensors[scale].shape
        if shape not in ((), (1,), (1, 1), (row.shape[0],), (row.shape[0], 1)):
            yield f"has the shape {list(row.shape)}, and {scale} {list(shape)}"
    if weight.dtype.itemsize == 1 and quantization_format(checkpoint.config) is None:
        yield f"is {weight.dtype}, and config.json says nothing of quantization"


def _other_faults(checkpoint: Checkpoint) -> Iterator[Fault]:
    """Finds the faults of tensors that are no matrices: scales, norms, biases."""
    matrices = set(checkpoint.matrices())
    for name, shard in checkpoint.where.items():
        module, _, part = name.rpartition(".")
        if module in matrices and part in ("weight", "compressed", "bitmask"):
            continue
        try:
            tensor = shard.read(name)
        except DamagedError as error:
            yield _fault(error)
            continue
        if not tensor.is_floating_point():
            continue
        values = comparable(tensor)
        if not bool(torch.isfinite(values).all()):
            yield Fault(shard.path.name, name, "holds NaN or infinity")
        elif part.endswith("_scale") and not bool((values > 0).all()):
            yield Fault(shard.path.name, name, "holds a scale that is not positive")


def _file_faults(path: Path) -> tuple[Fault, ...]:
    """Lists every file that cannot be read, where the checkpoint could not be."""
    if (path / SINGLE).exists():
        files = {SINGLE}
    else:
        try:
            named = read_json(path / INDEX).get("weight_map")
        except DamagedError as error:
            return (_fault(error),)
        files = set(named.values()) if isinstance(named, dict) else set()
    faults = []
    for file in sorted(name for name in files if isinstance(name, str)):
        try:
            open_shard(path / file)
        except DamagedError as error:
            faults.append(_fault(error))
    return tuple(faults)


def _fault(error: DamagedError) -> Fault:
    return Fault(error.path.name, error.tensor, error.reason)
