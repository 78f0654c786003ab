# SPDX-License-Identifier: Apache-2.0
"""Check that stored matrices follow an N:M pattern, however they are stored."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_permute_plugin.checkpoint.codec import clear_negative_zeros, nonzero_bits
from nm_permute_plugin.checkpoint.directory import Checkpoint
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.checkpoint.packed import (
    PACKED,
    of_groups,
    packed_levels,
    packed_modules,
)
from nm_permute_plugin.checkpoint.shards import DamagedError
from nm_permute_plugin.maths.pattern import NMPattern

_WORDS_OF_FLAGS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 1024  # channels that are transposed at a time


@dataclass(frozen=True)
class Violation:
    """
    Tells where a matrix breaks its pattern first, and what explains it.

    :param shape: the shape of the matrix
    :param row: the first row that breaks the pattern; None where the rows cannot be cut
        into groups of M at all
    :param channel: the first input channel of the first such group of that row
    :param count: how many non-zeros that group holds
    :param negative_zeros: whether the group holds too many only because of -0.0
    :param transposed: whether the matrix follows the pattern along its other axis
    :param cleared: whether the whole matrix would follow the pattern with +0.0 for -0.0
    """

    pattern: NMPattern
    shape: tuple[int, ...]
    row: int | None = None
    channel: int = 0
    count: int = 0
    negative_zeros: bool = False
    transposed: bool = False
    cleared: bool = False

    def __str__(self) -> str:
        if self.row is None:
            return f"its shape {list(self.shape)} holds no groups of {self.pattern.m}"
        last = self.channel + self.pattern.m - 1
        text = f"row {self.row}, channels {self.channel}..{last} hold {self.count} "
        text += "non-zeros" + ", some of them -0.0" * self.negative_zeros
        if self.transposed:
            text += ". It is along the other axis: it was pruned over outputs"
        return text


class BrokenPatternError(ValueError):
    """Says that a module does not follow the pattern that it was pruned to."""


def check_pattern(
    checkpoint: Checkpoint,
    modules: Collection[str],
    pattern: NMPattern,
    transposed: Collection[str] = (),
) -> dict[str, int]:
    """
    Reads every module back, one at a time, and checks that it follows the pattern.

    -0.0 counts as zero.

    :param transposed: the modules that are stored as [in, out]
    :return: the number of non-zeros of each module
    :raises BrokenPatternError: if a module does not follow the pattern, naming module,
        row and channels
    :raises ValueError: if the checkpoint has no weight for a module
    """
    nonzeros = {}
    known = {*checkpoint.formats, *packed_modules(checkpoint)}
    for module in modules:
        if module not in known:
            raise ValueError(
                f"{module} was pruned, and the checkpoint has no weight of that name"
            )
        found = examine_module(
            checkpoint, module, pattern, transposed=module in transposed
        ).found
        if isinstance(found, Violation):
            raise BrokenPatternError(
                f"{module} is not {pattern} any more: {found}. A modifier after the "
                "pruning does not keep its zeros (QuantizationModifier and GPTQModifier "
                "do), or leaves this module out; training keeps them under "
                "nm_permute_plugin.keep_masks only."
            )
        nonzeros[module] = found
    return nonzeros


@dataclass(frozen=True)
class Examined:
    """
    Is a module's weight, and what a pattern says of it.

    :param stored: [out, in], the weight, or the levels of a packed one
    :param levels: [out, in], all bits 0 exactly where the weight is zero
    :param found: the number of non-zeros, or where the pattern is broken
    """

    stored: Tensor
    levels: Tensor
    found: int | Violation

    @property
    def zeros(self) -> float:
        """Returns the share of its weights that are zero, 0 to 1."""
        nonzeros = int((comparable(self.levels) != 0).sum())
        return 1 - nonzeros / max(1, self.levels.numel())


def examine_module(
    checkpoint: Checkpoint,
    module: str,
    pattern: NMPattern,
    *,
    transposed: bool = False,
    clear: bool = True,
) -> Examined:
    """
    Reads a module's weight and holds it to a pattern: the one check of this package.

    A weight counts as zero if it is zero once it is loaded: this includes quantized
    levels equal to their zero point.

    :param transposed: whether it is stored as [in, out]
    :param clear: whether -0.0 counts as zero
    :raises DamagedError: if tensors of the module do not belong together
    :raises NotImplementedError: for a packing that is not known
    """
    stored = read_stored(checkpoint, module)
    levels = levels_of(checkpoint, module, stored, clear)
    if transposed:
        stored, levels = stored.t(), levels.t()
    return Examined(stored, levels, examine(levels, pattern))


def read_stored(checkpoint: Checkpoint, module: str) -> Tensor:
    """Reads a module's weight as it is stored, or the levels of a packed one."""
    if f"{module}{PACKED}" in checkpoint.where:
        return packed_levels(checkpoint, module)
    return checkpoint.weight(module)


def levels_of(
    checkpoint: Checkpoint, module: str, stored: Tensor, clear: bool = True
) -> Tensor:
    """
    Returns a matrix whose bits are all 0 exactly where the module's weight is zero.

    :param stored: what ``read_stored`` gave
    :param clear: whether -0.0 counts as zero
    :raises DamagedError: if a zero point does not belong to the weight
    """
    point = f"{module}.weight_zero_point"
    if point in checkpoint.where and f"{module}{PACKED}" not in checkpoint.where:
        zeros = checkpoint.read(point)
        if zeros.numel() > 1:
            if zeros.dim() != 2 or len(zeros) != len(stored):
                sizes = f"{list(zeros.shape)}, and its weight {list(stored.shape)}"
                file = checkpoint.where[point].path
                raise DamagedError(file, f"{point} is {sizes}", point)
            zeros = of_groups(zeros, stored.shape[1])
        return (comparable(stored) != comparable(zeros)).to(torch.int8)
    if stored.dtype not in WORDS:
        return (comparable(stored) != 0).to(torch.int8)
    return clear_negative_zeros(stored) if clear else stored


def examine(levels: Tensor, pattern: NMPattern) -> int | Violation:
    """
    Counts the non-zeros of a matrix, or finds where it breaks the pattern.

    :param levels: [out, in] in a dtype of ``WORDS``; only +0.0 is a zero

    >>> examine(torch.tensor([[0.0, 1.0, 2.0, 0.0]]), NMPattern(2, 4))
    2
    >>> print(examine(torch.tensor([[-0.0, 1.0, 2.0, 0.0]]), NMPattern(2, 4)))
    row 0, channels 0..3 hold 3 non-zeros, some of them -0.0
    """
    shape, m = tuple(levels.shape), pattern.m
    if len(shape) != 2 or shape[1] % m:
        return Violation(pattern, shape)
    counts = _group_counts(levels, m)
    if not counts.numel() or int(counts.max()) <= pattern.n:
        return int(counts.sum())
    row, group = (counts > pattern.n).nonzero()[0].tolist()
    values = comparable(levels[row, group * m : group * m + m])
    negative = int((values != 0).sum()) <= pattern.n
    transposed = shape[0] % m == 0 and all(
        int(_group_counts(part.t(), m).max()) <= pattern.n
        for part in levels.split(_PART, 1)
    )
    cleared = negative and isinstance(
        examine(clear_negative_zeros(levels), pattern), int
    )
    return Violation(
        pattern=pattern,
        shape=shape,
        row=row,
        channel=group * m,
        count=int(counts[row, group]),
        negative_zeros=negative,
        transposed=transposed,
        cleared=cleared,
    )


def comparable(tensor: Tensor) -> Tensor:
    """Returns the values in a dtype that torch compares, which float8 is not."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _group_counts(levels: Tensor, m: int) -> Tensor:
    """Counts the non-zeros of every M neighbouring inputs."""
    flags = nonzero_bits(levels)
    word = _WORDS_OF_FLAGS.get(m)
    if word is None:
        return flags.view(len(levels), -1, m).sum(-1, dtype=torch.int16)
    # the bytes of a word, 0 or 1 each, are added up in its top byte
    ones = 0x0101010101010101 & (1 << 8 * m) - 1
    return flags.view(word).mul(ones) >> 8 * (m - 1)
