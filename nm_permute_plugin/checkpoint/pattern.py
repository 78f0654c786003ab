# SPDX-License-Identifier: Apache-2.0
"""Hold a finished checkpoint to the pattern, and choose how to store it."""

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nm_permute_plugin.checkpoint.codec import WORDS, clear_negative_zeros
from nm_permute_plugin.checkpoint.config import Format, quantization_format
from nm_permute_plugin.checkpoint.directory import Checkpoint, open_checkpoint
from nm_permute_plugin.checkpoint.packed import packed_levels, packed_modules
from nm_permute_plugin.checkpoint.plan import (
    EIGHT_BIT,
    PACKED_EXPERTS,
    TRANSPOSED,
    TWO_FOUR,
    experts_of,
    find_excess,
)
from nm_permute_plugin.maths.pattern import NMPattern

AskedFormat = Literal["auto", "dense", "sparse-24-bitmask", "sparse-bitmask"]


def check_pattern(
    path: Path,
    modules: Collection[str],
    pattern: NMPattern,
    transposed: Collection[str] = (),
) -> None:
    """
    Read every module back, one at a time, and see that it follows the pattern.

    Zero is what is zero once it is loaded: -0.0 too, and the zero of a packed level.

    :param transposed: the modules that are stored as [in, out]
    :raises ValueError: if one does not, naming module, row and channels, or has no
        weight in the checkpoint
    """
    checkpoint = open_checkpoint(path)
    packed = set(packed_modules(checkpoint))
    for module in modules:
        if module not in packed and module not in checkpoint.formats:
            raise ValueError(
                f"{module} was pruned, and the checkpoint has no weight of that name"
            )
        levels = stored_levels(checkpoint, module, module in packed)
        if module in transposed:
            levels = levels.t().contiguous()
        found = find_excess(levels, pattern)
        if found is not None:
            row, channel, count = found
            raise ValueError(
                f"{module} is not {pattern} any more: row {row}, channels {channel}.."
                f"{channel + pattern.m - 1} hold {count} non-zeros. A modifier after the "
                "pruning does not keep its zeros (GPTQModifier does not, "
                "QuantizationModifier does), or leaves this module out; the checkpoint "
                "is not written."
            )


def to_store_sparse(asked: AskedFormat, pruned: Collection[str]) -> list[str]:
    """
    The pruned modules that a sparse format stores sparse; experts only if asked for.

    >>> to_store_sparse("auto", ["mlp.experts.0.up_proj", "self_attn.q_proj"])
    ['self_attn.q_proj']
    """
    experts = set(experts_of(pruned)) if asked == "auto" else ()
    return [name for name in pruned if name not in experts]


def stored_levels(checkpoint: Checkpoint, module: str, packed: bool) -> Tensor:
    """A module's weight as it is stored, in a dtype in which only a zero is all 0."""
    if packed:
        return packed_levels(checkpoint, module)
    weight = checkpoint.weight(module)
    point = f"{module}.weight_zero_point"
    if point in checkpoint.where:
        zeros = checkpoint.read(point)
        return (weight != zeros).to(torch.int8)
    if weight.dtype in WORDS:
        return clear_negative_zeros(weight)
    return (weight != 0).to(torch.int8)


def choose_format(
    path: Path,
    asked: AskedFormat,
    pattern: NMPattern,
    pruned: Collection[str],
    transposed: Collection[str] = (),
) -> tuple[Format, str]:
    """
    How a checkpoint is stored, and why.

    :param asked: auto is sparse-24-bitmask where the pattern is 2:4 and the weights have
        8 bits and more, and dense elsewhere
    :param transposed: the modules that are stored as [in, out]
    """
    if not pruned:
        return "dense", "nothing is pruned"
    if asked == "dense":
        return "dense", "asked for"
    if transposed:
        return "dense", TRANSPOSED
    checkpoint = open_checkpoint(path)
    quantized = quantization_format(checkpoint.config)
    if experts_of(pruned) and quantized is not None:
        return "dense", PACKED_EXPERTS
    if quantized is not None and quantized not in EIGHT_BIT:
        return "dense", f"sparse formats cannot hold {quantized}; its zeros are kept"
    if any(name.endswith(".weight_zero_point") for name in checkpoint.where):
        return "dense", "quantized around a zero point, zeros are not stored as zeros"
    if asked != "auto":
        return asked, "asked for"
    if pattern == TWO_FOUR and to_store_sparse(asked, pruned):
        experts = "; experts are stored dense, as vLLM serves them"
        said = "the default for 2:4" + experts * bool(experts_of(pruned))
        return "sparse-24-bitmask", said
    return "dense", f"the default for {pattern}"
