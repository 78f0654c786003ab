# SPDX-License-Identifier: Apache-2.0
"""Find everything that is wrong with a checkpoint on disk."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nm_permute_plugin.checkpoint.codec import WORDS, clear_negative_zeros
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
from nm_permute_plugin.checkpoint.packed import (
    PACKED,
    packed_levels,
    packed_modules,
)
from nm_permute_plugin.checkpoint.plan import find_excess, is_embedding
from nm_permute_plugin.checkpoint.record import read_promise
from nm_permute_plugin.checkpoint.shards import DamagedError, open_shard
from nm_permute_plugin.maths.pattern import NMPattern


@dataclass(frozen=True)
class Row:
    """
    A weight matrix of the checkpoint.

    :param format: dense, one of the sparse ones, or packed: less than 8 bits a weight
    :param dtype: of what is stored; of the levels where it is packed
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
    """What is wrong, and where; the tensor is empty where a whole file is meant."""

    file: str
    tensor: str
    message: str


@dataclass(frozen=True)
class Report:
    """
    What was found in a checkpoint.

    :param rows: its matrices, as far as they could be read
    :param faults: all that is wrong with it; empty for a good one
    """

    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def verify(
    path: Path | str,
    modules: Collection[str] | None = None,
    pattern: NMPattern | None = None,
) -> Report:
    """
    Read a whole checkpoint, and compare it with what it says of itself.

    Checked are: the index against the files, headers, lengths and checksums of the
    files; dtypes, shapes and bitmasks of what is stored sparse; the N:M pattern of
    every promised module; that weights and scales are finite, and scales positive.

    :param modules: what must be sparse; None for what ``config.json`` promises, and the
        record of the run that pruned
    :param pattern: None for the one promised, or 2:4
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
    pattern = pattern or said or NMPattern(2, 4)
    declared = _declared(checkpoint, sparsity, modules)
    promised = declared | set(recorded.modules if recorded else ())
    packed = packed_modules(checkpoint)
    faults = [
        Fault("config.json", name, "is said to be sparse, and has no weight")
        for name in sorted(promised - set(checkpoint.formats) - set(packed))
    ]
    rows = []
    for module in packed:
        file = checkpoint.where[f"{module}{PACKED}"].path.name
        try:
            levels = packed_levels(checkpoint, module)
        except (DamagedError, NotImplementedError) as error:
            faults.append(Fault(file, module, getattr(error, "reason", str(error))))
            continue
        row = _row("packed", module, levels, pattern, module in promised)
        rows.append(row)
        if row.promised and not row.sparse:
            faults.append(Fault(file, module, _pattern_fault(levels, pattern)))
    for module in checkpoint.matrices():
        try:
            weight = checkpoint.weight(module)
        except DamagedError as error:
            faults.append(_fault(error))
            continue
        stored = checkpoint.formats[module]
        if stored == "dense" and module not in declared and weight.dtype in WORDS:
            weight = clear_negative_zeros(weight)  # harmless where zeros are stored
        if recorded and module in recorded.transposed:
            weight = weight.t().contiguous()
        row = _row(stored, module, weight, pattern, module in promised)
        rows.append(row)
        faults += [
            Fault(checkpoint.file(module).name, module, message)
            for message in [
                *_storage_faults(stored, sparsity, module in declared),
                *_weight_faults(checkpoint, row, weight, pattern),
            ]
        ]
    faults += _other_faults(checkpoint)
    return Report(tuple(rows), tuple(faults))


def _declared(
    checkpoint: Checkpoint,
    sparsity: SparsityConfig | None,
    modules: Collection[str] | None,
) -> set[str]:
    """What config.json, or the caller, says is sparse; classes: all but embeddings."""
    if modules is not None:
        return set(modules)
    if sparsity is None:
        return set()
    named = {
        name
        for name in sparsity.targets or ()
        if "." in name and not name.startswith("re:")
    } - set(sparsity.ignore)
    return named | {
        name
        for name in checkpoint.matrices()
        if sparsity.promises(name, "Embedding" if is_embedding(name) else "Linear")
        and not (sparsity.targets is None and is_embedding(name))
    }


def _row(
    stored: str,
    module: str,
    weight: Tensor,
    pattern: NMPattern,
    promised: bool,
) -> Row:
    known = weight.dtype in WORDS
    fits = known and weight.shape[1] % pattern.m == 0
    values = _values(weight)
    return Row(
        module=module,
        format=stored,
        dtype=weight.dtype,
        shape=tuple(weight.shape),
        zeros=1 - int((values != 0).sum()) / max(1, weight.numel()),
        sparse=fits and find_excess(weight, pattern) is None,
        promised=promised,
    )


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


def _weight_faults(
    checkpoint: Checkpoint, row: Row, weight: Tensor, pattern: NMPattern
) -> Iterator[str]:
    if row.promised and not row.sparse:
        yield _pattern_fault(weight, pattern)
    if not bool(torch.isfinite(_values(weight)).all()):
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


def _pattern_fault(weight: Tensor, pattern: NMPattern) -> str:
    if weight.dtype not in WORDS or weight.shape[1] % pattern.m:
        return f"cannot be {pattern}: it is {weight.dtype} {list(weight.shape)}"
    found = find_excess(weight, pattern)
    if found is None:
        return f"is not {pattern}"
    row, channel, count = found
    text = (
        f"is not {pattern}: row {row}, channels {channel}..{channel + pattern.m - 1} "
        f"hold {count} non-zeros"
    )
    group = _values(weight[row, channel : channel + pattern.m])
    if int((group != 0).sum()) <= pattern.n:
        text += ", some of them -0.0"
    if len(weight) % pattern.m == 0 and find_excess(weight.t(), pattern) is None:
        text += ". It is along the other axis: it was pruned over outputs"
    return text


def _other_faults(checkpoint: Checkpoint) -> Iterator[Fault]:
    """Faults of the tensors that are no matrices: scales, norms, biases."""
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
        values = _values(tensor)
        if not bool(torch.isfinite(values).all()):
            yield Fault(shard.path.name, name, "holds NaN or infinity")
        elif part.endswith("_scale") and not bool((values > 0).all()):
            yield Fault(shard.path.name, name, "holds a scale that is not positive")


def _file_faults(path: Path) -> tuple[Fault, ...]:
    """Every file that cannot be read on its own, where the whole could not be."""
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


def _values(tensor: Tensor) -> Tensor:
    """The values, in a dtype that can be compared: float8 cannot."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor
