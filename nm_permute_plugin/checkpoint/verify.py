# SPDX-License-Identifier: Apache-2.0
"""Find everything that is wrong with a checkpoint on disk."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from nm_permute_plugin.checkpoint.checksums import find_changes
from nm_permute_plugin.checkpoint.config import (
    SparsityConfig,
    has_old_name,
    read_sparsity_config,
)
from nm_permute_plugin.checkpoint.directory import (
    Checkpoint,
    open_checkpoint,
    read_json,
)
from nm_permute_plugin.checkpoint.faults import (
    Fault,
    fault_of,
    file_faults,
    forgotten,
    other_faults,
    storage_faults,
    unexamined,
    weight_faults,
)
from nm_permute_plugin.checkpoint.packed import PACKED, packed_modules
from nm_permute_plugin.checkpoint.pattern import Violation, examine_module
from nm_permute_plugin.checkpoint.plan import is_conv1d, is_embedding
from nm_permute_plugin.checkpoint.prunable import prunable
from nm_permute_plugin.checkpoint.record import read_promise
from nm_permute_plugin.checkpoint.shards import DamagedError
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
class Report:
    """
    Says what was found in a checkpoint.

    :param rows: its matrices, as far as they could be read
    :param faults: all that is wrong with it
    :param checksums: whether it has checksums, which find every change of its files
    """

    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    checksums: bool = False

    def __repr__(self) -> str:
        """Returns the main figures, and the first faults, in a line."""
        promised = sum(row.promised for row in self.rows)
        shown = [f"{f.file} {f.tensor}: {f.message}"[:200] for f in self.faults[:3]]
        first = f", first {'; '.join(shown)}" if shown else ""
        return (
            f"Report(good={self.good}, {len(self.rows)} matrices, {promised} of them "
            f"promised sparse, {len(self.faults)} faults{first})"
        )

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
        record of the run that pruned. If these promise nothing, and a pattern is given,
        every linear of the layers must follow it
    :param pattern: None for the one that is promised, or else 2:4
    """
    path = Path(path)
    changes = find_changes(path)
    changed = [Fault(file, "", text) for file, text in (changes or {}).items()]
    rows, faults = _verify(path, modules, pattern)
    known = {(fault.file, fault.tensor) for fault in faults}
    changed = [fault for fault in changed if (fault.file, "") not in known]
    return Report(tuple(rows), (*changed, *faults), changes is not None)


def _verify(
    path: Path, modules: Collection[str] | None, pattern: NMPattern | None
) -> tuple[list[Row], list[Fault]]:
    """Returns a checkpoint's matrices and faults, its checksums aside."""
    try:
        sparsity = read_sparsity_config(read_json(path / "config.json"))
    except DamagedError as error:
        return [], [fault_of(error)]
    except ValueError as error:
        return [], [Fault("config.json", "sparsity_config", str(error))]
    try:
        checkpoint = open_checkpoint(path)
    except DamagedError as error:
        return [], file_faults(path) or [fault_of(error)]
    recorded = None
    if modules is None:
        try:
            recorded = read_promise(path)
        except ValueError as error:
            return [], [Fault("nm_permute/report.json", "", str(error))]
    said = sparsity.pattern if sparsity else recorded and recorded.pattern
    declared = set(modules or ())
    if modules is None and sparsity is not None:
        try:
            declared = declared_sparse(checkpoint, sparsity)
        except ValueError as error:
            return [], [Fault("config.json", "sparsity_config", str(error))]
    transposed = set(recorded.transposed if recorded else ())
    promised = declared | set(recorded.modules if recorded else ())
    faults = []
    if modules is None and pattern is not None and not promised:
        promised = prunable(checkpoint)
        transposed = {name for name in promised if is_conv1d(checkpoint, name)}
        faults = unexamined(checkpoint, promised, pattern)
    asked = _Asked(
        sparsity,
        pattern or said or NMPattern(2, 4),
        declared,
        promised,
        transposed,
    )
    matrices = dict.fromkeys(packed_modules(checkpoint), "packed")
    matrices |= {name: checkpoint.formats[name] for name in checkpoint.matrices()}
    faults += [
        Fault("config.json", name, "is said to be sparse, and has no weight")
        for name in sorted(asked.promised - set(checkpoint.formats) - set(matrices))
    ]
    if has_old_name(checkpoint.config):
        message = (
            "transformers passes it over and starts from random weights; call it "
            "quantization_config"
        )
        faults.append(Fault("config.json", "compression_config", message))
    faults += forgotten(checkpoint, sparsity)
    rows = []
    for module, stored in matrices.items():
        row, found = _examine(checkpoint, module, stored, asked)
        rows += [row] if row else []
        faults += found
    return rows, [*faults, *other_faults(checkpoint)]


@dataclass(frozen=True)
class _Asked:
    """
    Says what a checkpoint is held to.

    :param declared: the modules that config.json, or the caller, says are sparse
    :param promised: those, and the ones that the record of the run names; where there
        are none and a pattern is demanded, every linear of the layers
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
        examined = examine_module(
            checkpoint,
            module,
            asked.pattern,
            transposed=module in asked.transposed,
            # -0.0 does no harm where all zeros are stored
            clear=stored == "dense" and not declared,
        )
    except (DamagedError, NotImplementedError) as error:
        if isinstance(error, DamagedError) and not packed:
            return None, [fault_of(error)]
        return None, [Fault(file, module, getattr(error, "reason", str(error)))]
    weight, found = examined.stored, examined.found
    row = Row(
        module=module,
        format=stored,
        dtype=weight.dtype,
        shape=tuple(weight.shape),
        zeros=examined.zeros,
        sparse=not isinstance(found, Violation),
        promised=module in asked.promised,
    )
    messages = []
    if row.promised and isinstance(found, Violation):
        messages.append(f"is not {asked.pattern}: {found}")
    if not packed:
        messages += storage_faults(stored, asked.sparsity, declared)
        messages += weight_faults(checkpoint, module, weight)
    return row, [Fault(file, module, message) for message in messages]


def declared_sparse(checkpoint: Checkpoint, sparsity: SparsityConfig) -> set[str]:
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
