# SPDX-License-Identifier: Apache-2.0
"""Convert a finished checkpoint from one format to another, shard by shard."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor

from nm_permute_plugin._words import file_size
from nm_permute_plugin.checkpoint import disk, transaction
from nm_permute_plugin.checkpoint.bitmask import compress_any
from nm_permute_plugin.checkpoint.card_file import CARD, is_ours
from nm_permute_plugin.checkpoint.checksums import refuse_changed, write_checksums
from nm_permute_plugin.checkpoint.codec import clear_negative_zeros, compress
from nm_permute_plugin.checkpoint.config import (
    Format,
    Json,
    quantization_format,
    read_sparsity_config,
    with_sparsity_config,
)
from nm_permute_plugin.checkpoint.directory import (
    INDEX,
    PARTS,
    Checkpoint,
    open_checkpoint,
    read_json,
)
from nm_permute_plugin.checkpoint.legacy import legacy_config, legacy_tokenizer_config
from nm_permute_plugin.checkpoint.model_card import write_storage
from nm_permute_plugin.checkpoint.plan import (
    SPARSE_ALL_THE_SAME,
    TWO_FOUR,
    Plan,
    global_sparsity,
    make_plan,
    sparsity_config,
)
from nm_permute_plugin.checkpoint.prunable import is_prunable
from nm_permute_plugin.checkpoint.record import FOLDER, read_promise
from nm_permute_plugin.checkpoint.report import PAGE, make_page_if_possible
from nm_permute_plugin.checkpoint.shard_writer import ShardWriter, tie
from nm_permute_plugin.checkpoint.shards import DamagedError, Shard, open_shard
from nm_permute_plugin.checkpoint.source import carry_files, check_files, list_files
from nm_permute_plugin.maths.pattern import NMPattern

Announced = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Conversion:
    """
    Says what a conversion did.

    :param format: the format that was asked for
    :param compressed: the modules that are stored sparse now
    :param dense: the matrices that are not, and why
    :param bytes_before: how many bytes the weight files of the source take on disk
    :param bytes_after: how many those of the target take
    :param global_sparsity: the zeros of the sparse modules, as a share of all weights
    """

    format: Format
    compressed: tuple[str, ...]
    dense: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    global_sparsity: float


def convert(
    source: Path | str,
    target: Path | str,
    format: Format,
    *,
    modules: Collection[str] | None = None,
    pattern: NMPattern = TWO_FOUR,
    clear_zeros: bool = False,
    dense_experts: bool = False,
    legacy: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """
    Writes a checkpoint again in another format; no stored weight changes a bit.

    Shards stay shards, and one matrix at a time is in memory. Files that are not weights
    travel along, other weights of the source do not. The target appears when
    it is complete; whatever goes wrong before, the old one stays as it is. Source and
    target may be the same directory. 4-bit and other packed quantizations stay as they
    are, and ``dense`` of the result says so.

    :param source: a directory with ``config.json`` and safetensors
    :param modules: those that must be stored sparse; None for every matrix that follows
        the pattern, embeddings aside
    :param pattern: 2:4, or another for the format ``sparse-bitmask``
    :param clear_zeros: store -0.0 as +0.0, which a product with a mask leaves behind;
        for sparse formats
    :param dense_experts: leave routed experts dense
    :param legacy: write config and tokenizer for transformers 4 and vLLM up to 0.18.1
    :param overwrite: replace a target that is not the source and not empty
    :raises ValueError: if the source is damaged, a module of ``modules`` is missing or
        does not follow the pattern, or the format cannot store the pattern; where
        ``modules`` is None, if no matrix follows the pattern, or one does but for -0.0
    :raises FileExistsError: if the target holds something and ``overwrite`` is not set
    :raises OSError: if the target cannot be written, the disk being full for example
    """
    if clear_zeros and format == "dense":
        raise ValueError("clearing -0.0 is for sparse formats, and not for dense")
    source, target = Path(source).resolve(), Path(target).resolve()
    checkpoint = open_checkpoint(source)
    if target in source.parents:
        raise ValueError(f"{target} holds {source}; write somewhere else")
    if target != source:
        disk.refuse_occupied(target, overwrite)
    refuse_changed(source)
    read_sparsity_config(
        checkpoint.config
    )  # a block that nobody understands is refused
    _refuse_unsaid(checkpoint)
    plan = make_plan(checkpoint, format, modules, pattern, clear_zeros, dense_experts)
    if modules is None:
        _refuse_pointless(checkpoint, plan)
    return rewrite(checkpoint, plan, target, legacy, was_empty=not overwrite)


def rewrite(
    checkpoint: Checkpoint,
    plan: Plan,
    target: Path,
    legacy: bool = False,
    was_empty: bool = False,
    checksums: bool = True,
) -> Conversion:
    """
    Does what a plan says, as ``convert`` describes.

    :param target: a resolved path
    :param was_empty: whether a target that is not the source has been seen to be empty
    :param checksums: whether files are complete, and get their checksums
    """
    source = checkpoint.path
    zeros = global_sparsity(checkpoint, plan)
    config = with_sparsity_config(checkpoint.config, sparsity_config(plan, zeros))
    if legacy:
        config = legacy_config(config)
    before = sum(shard.path.stat().st_size for shard in checkpoint.shards)
    names = [shard.path.name for shard in checkpoint.shards]

    def keep(name: str) -> bool:
        return name not in (*names, INDEX)

    in_place = target == source
    needed = sum(_bytes(checkpoint, plan, shard) for shard in checkpoint.shards)
    if not in_place:
        check_files(source)
        travels = list_files(source).travels
        needed += sum((source / name).stat().st_size for name in travels)
    disk.refuse_full(target, needed)
    with transaction.directory(
        target,
        keep if in_place else None,
        was_empty=was_empty and not in_place,
    ) as fresh:
        for shard in checkpoint.shards:
            _write_shard(checkpoint, plan, shard, fresh / shard.path.name)
        tie([fresh / name for name in names])
        after = sum((fresh / name).stat().st_size for name in names)
        if checkpoint.index is not None:
            index = _index(checkpoint.index, fresh, names)
            disk.write_json(fresh / INDEX, index)
        disk.write_json(fresh / "config.json", config)
        words = source / "tokenizer_config.json"
        if legacy and words.exists():
            new = legacy_tokenizer_config(read_json(words))
            disk.write_json(fresh / words.name, new)
        if target != source:
            disk.take(source, fresh, FOLDER.__eq__)
            carry_files(source, fresh)
        elif checksums:
            disk.take(source, fresh, FOLDER.__eq__, link=True)
        if checksums:
            _tell_card(source, fresh, plan)
            write_checksums(fresh, names)
            if (fresh / PAGE).exists():
                make_page_if_possible(fresh)  # it tells the size on disk
    sparse, every = len(plan.nonzeros), len(plan.nonzeros) + len(plan.dense)
    stored = (
        f"{sparse} of {every} matrices are stored as {plan.format}, the others dense"
    )
    if plan.format == "dense" or not sparse:
        stored = f"all {every} matrices are stored dense"
    logger.info(
        f"{stored}; the weights take {file_size(after)} after {file_size(before)}"
    )
    compressed = tuple(plan.nonzeros)
    return Conversion(plan.format, compressed, plan.dense, before, after, zeros)


def _tell_card(source: Path, fresh: Path, plan: Plan) -> None:
    """Says anew in a card of ours how the weights are stored."""
    promise = read_promise(fresh)
    if promise is None or not is_ours(source):
        return
    if not (fresh / CARD).exists():
        disk.copy_file(source / CARD, fresh / CARD)
    stored = plan.format if plan.nonzeros else "dense"
    try:
        write_storage(fresh, promise, stored, "converted")
    except ValueError as error:  # a card is no reason to refuse the weights
        logger.warning(f"the card does not say how the weights are stored now: {error}")


def _refuse_unsaid(checkpoint: Checkpoint) -> None:
    """Refuses quantized weights of which config.json says nothing: nothing reads them."""
    if quantization_format(checkpoint.config) is not None:
        return
    for module in checkpoint.matrices():
        dtype, _ = checkpoint.dense_layout(module)
        if dtype.itemsize == 1:
            raise DamagedError(
                checkpoint.path / "config.json",
                f"says nothing of quantization, and {module} is {dtype}: take "
                "quantization_config from the config.json that it came with",
            )


def _refuse_pointless(checkpoint: Checkpoint, plan: Plan) -> None:
    """Refuses a source that is not sparse, or that -0.0 keeps from being sparse."""
    negative = [name for name, found in plan.violations.items() if found.cleared]
    if negative:
        name, others = negative[0], len(negative) - 1
        raise ValueError(
            f"{checkpoint.path}: {name} and {others} other matrices are {plan.pattern} "
            "but for -0.0, which a product with a mask leaves behind "
            f"({plan.violations[name]}); --clear-zeros, clear_zeros=True in Python, "
            "stores +0.0 instead"
        )
    unfit = any(reason in SPARSE_ALL_THE_SAME for reason in plan.dense.values())
    if plan.violations and not plan.nonzeros and not unfit:
        name = max(plan.violations, key=is_prunable)  # the first, the head aside
        raise ValueError(
            f"{checkpoint.path} is not sparse: none of its matrices is {plan.pattern} "
            f"({name}: {plan.violations[name]}). Prune it first, with `nm-permute prune`"
        )


def _write_shard(checkpoint: Checkpoint, plan: Plan, shard: Shard, path: Path) -> None:
    """Writes a shard of the target; a sparse module goes where its values were."""
    copied, modules = _parts_of(checkpoint, plan, shard)
    announced = dict(copied)
    for module in modules:
        announced |= _announce(checkpoint, plan, module)
    with ShardWriter(path, announced, {"format": "pt", **shard.metadata}) as out:
        for name in copied:
            out.write(name, shard.read(name))
        for module in modules:
            made = _encode(plan, module, checkpoint.weight(module))
            for name, tensor in made.items():
                out.write(name, tensor)


def _bytes(checkpoint: Checkpoint, plan: Plan, shard: Shard) -> int:
    """Counts the bytes of the tensors that a shard of the target will hold."""
    announced, modules = _parts_of(checkpoint, plan, shard)
    for module in modules:
        announced |= _announce(checkpoint, plan, module)
    return sum(math.prod(s) * dtype.itemsize for dtype, s in announced.values())


def _parts_of(
    checkpoint: Checkpoint, plan: Plan, shard: Shard
) -> tuple[Announced, list[str]]:
    """Lists the tensors that a shard of the target takes over, and the modules it holds."""
    copied: Announced = {}
    modules = []
    for name, layout in shard.tensors.items():
        module, _, part = name.rpartition(".")
        stored = checkpoint.formats.get(module, "dense")
        parts = PARTS[stored]
        if part not in parts or (stored == "dense" and module not in plan.nonzeros):
            copied[name] = (layout.dtype, layout.shape)
        elif part == parts[0]:
            modules.append(module)
    return copied, modules


def _announce(checkpoint: Checkpoint, plan: Plan, module: str) -> Announced:
    """Lists the tensors of a module as the target stores it, before they are made."""
    dtype, (rows, columns) = checkpoint.dense_layout(module)
    if module not in plan.nonzeros:
        return {f"{module}.weight": (dtype, (rows, columns))}
    bits = (torch.uint8, (rows, -(-columns // 8)))
    if plan.format == "sparse-24-bitmask":
        return {
            f"{module}.compressed": (dtype, (rows, columns // 2)),
            f"{module}.bitmask": bits,
            f"{module}.shape": (torch.int64, (2, 1)),
        }
    return {
        f"{module}.compressed": (dtype, (plan.nonzeros[module],)),
        f"{module}.bitmask": bits,
        f"{module}.row_offsets": (torch.int64, (rows,)),
        f"{module}.shape": (torch.int64, (2,)),
    }


def _encode(plan: Plan, module: str, weight: Tensor) -> dict[str, Tensor]:
    """Makes the tensors of a module as the target stores it."""
    if module not in plan.nonzeros:
        return {f"{module}.weight": weight}
    if plan.clear:
        weight = clear_negative_zeros(weight)
    encode = compress if plan.format == "sparse-24-bitmask" else compress_any
    stored = encode(weight, f"{module}.weight")
    return {f"{module}.{part}": getattr(stored, part) for part in PARTS[plan.format]}


def _index(old: Json, fresh: Path, names: list[str]) -> Json:
    shards = [open_shard(fresh / name) for name in names]
    size = sum(shard.path.stat().st_size - shard.data for shard in shards)
    weight_map = {name: shard.path.name for shard in shards for name in shard.tensors}
    metadata = old.get("metadata")
    kept = metadata if isinstance(metadata, dict) else {}
    return {
        **old,
        "metadata": {**kept, "total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }
