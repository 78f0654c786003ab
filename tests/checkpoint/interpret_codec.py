# SPDX-License-Identifier: Apache-2.0
"""
Print, as JSON, the cases in which Triton's codec does not do what PyTorch's does.

A process of its own: Triton decides whether to interpret when it is first imported.
"""

import json
import os

import torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

from checkpoint_files import random_bits  # noqa: E402

from nm_permute_plugin.checkpoint.codec import compress  # noqa: E402
from nm_permute_plugin.checkpoint.layout24 import WORDS  # noqa: E402

SHAPES = [(1, 4), (3, 8), (5, 12), (64, 64), (70, 516), (9, 4096), (2, 4100)]
"""Rows of whole octets and not, less than a program's and more."""


def mistakes(rows: int, columns: int, dtype: torch.dtype) -> list[str]:
    """What differs for random bits, with none, one and two of four kept in turn."""
    from nm_permute_plugin.checkpoint.codec_triton import (
        compress_in_triton,
        decompress_in_triton,
    )

    found = []
    for kept in range(3):
        weight = random_bits(rows, columns, dtype, seed=columns + kept, kept=kept)
        words = weight.view(WORDS[dtype])
        expected = compress(weight)
        values, bitmask = compress_in_triton(words)
        if not torch.equal(values, expected.compressed.view(WORDS[dtype])):
            found.append(f"values, {kept} kept")
        if not torch.equal(bitmask, expected.bitmask):
            found.append(f"bitmask, {kept} kept")
        if not torch.equal(decompress_in_triton(values, bitmask, columns), words):
            found.append(f"weight, {kept} kept")
    for row, group in ((0, 0), (rows - 1, columns // 4 - 1)):
        dense = words.clone()
        dense[row, 4 * group : 4 * group + 3] = 7
        if compress_in_triton(dense) is not None:
            found.append(f"three of four in row {row} are not refused")
        bits = bitmask.clone()
        bits[row, group // 2] ^= 1 << (4 * (group % 2))
        if decompress_in_triton(values, bits, columns) is not None:
            found.append(f"a wrong bit in row {row} is not refused")
    if columns % 8:
        bits = bitmask.clone()
        bits[-1, -1] |= 3 << 4
        if decompress_in_triton(values, bits, columns) is not None:
            found.append("bits beyond the last channel are not refused")
    return [f"{dtype} [{rows}, {columns}]: {text}" for text in found]


if __name__ == "__main__":
    cases = [(*shape, dtype) for shape in SHAPES for dtype in WORDS]
    print(
        json.dumps([len(cases), [text for case in cases for text in mistakes(*case)]])
    )
