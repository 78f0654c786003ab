# SPDX-License-Identifier: Apache-2.0
"""Kernel tables as serving keeps them, with made-up times."""

from pathlib import Path

from nm_permute_plugin.serving import kernel_table
from nm_permute_plugin.serving.kernel_table import Bucket, Choice, KernelTable

DIGEST = "0123456789abcdef"


def keep(
    folder: Path,
    shape: str,
    dense: float,
    sparse: float,
    digest: str = DIGEST,
    dtype: str = "bfloat16",
) -> Path:
    """
    Keep a table of one shape, for 1 and for 16 tokens.

    :param dense: microseconds for 1 token; 16 tokens take twice as long
    :param sparse: the same
    """
    buckets = []
    for tokens, factor in ((1, 1.0), (16, 2.0)):
        ours = Choice("mma_sp", (1, 16), sparse * factor)
        plain = Choice("dense", (), dense * factor)
        best = min(ours, plain, key=lambda choice: choice.microseconds)
        buckets.append(Bucket(tokens, best, [ours, plain]))
    path = folder / f"NVIDIA-H100-80GB-HBM3-{shape}-{dtype}-{digest}.json"
    kernel_table.save(KernelTable(64, buckets), path)
    return path
