# SPDX-License-Identifier: Apache-2.0
"""
Print how far Triton's masks and moves are from PyTorch's, two numbers a case, as JSON.

A process of its own: Triton decides whether to interpret when it is first imported.
"""

import json
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if __name__ == "__main__" and DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from nm_permute_plugin.maths.mask_gradients import (  # noqa: E402
    RowSample,
    grouped_mask,
    insertion_costs,
    multiplied,
    rivalry,
)
from nm_permute_plugin.maths.pattern import NMPattern  # noqa: E402
from nm_permute_plugin.pruning.learn.grouping import Grouping  # noqa: E402

PATTERNS = [NMPattern(2, 4), NMPattern(4, 8), NMPattern(2, 3)]
WAYS = [(1, RowSample(), True), (3, RowSample(), True), (3, RowSample(1, 3), True)]
PROGRAMS = 8
"""As few as make a part of several sections, where there are many."""

CASES = [
    *((pattern, *way) for pattern in PATTERNS for way in WAYS),
    (PATTERNS[0], 1, RowSample(1, 3), False),
    (PATTERNS[0], 13, RowSample(), True),
    (PATTERNS[0], 13, RowSample(1, 3), True),
]


def differences(
    pattern: NMPattern, sections: int, sample: RowSample, multipliers: bool
) -> tuple[int, float]:
    """Masks that differ, and the largest difference of costs; some scores are equal."""
    from nm_permute_plugin.maths import mask_gradients_triton as triton_insertion
    from nm_permute_plugin.maths.mask_gradients_triton import (
        kept_in_triton,
        moves_in_triton,
    )

    triton_insertion.PROGRAMS = PROGRAMS
    generator = torch.Generator().manual_seed(sections)
    blocks, groups = 2, 3
    size = groups * pattern.m
    keys = torch.rand(blocks, size, generator=generator).argsort()
    grouping = Grouping(
        torch.randperm(blocks * size, generator=generator).to(DEVICE),
        torch.arange(groups).repeat_interleave(pattern.m)[keys].to(DEVICE),
        pattern,
    )
    shape = (sections * 17, blocks * size)
    score = torch.rand(shape, generator=generator).mul(20).floor().to(DEVICE)
    grad = torch.randn(shape, generator=generator).bfloat16().to(DEVICE)
    logs = torch.randint(0, 3, (sections, blocks, size), generator=generator).float()
    logs = logs.to(DEVICE)

    scaled, of_mask = multiplied(grouping.blocks(score), logs), grouping.blocks(grad)
    factor = logs.exp().flatten(1)
    mask = grouping.blocks(kept_in_triton(score, factor, grouping))
    wrong = int((mask != grouped_mask(scaled, grouping.column, pattern)).sum())

    found, of_multiplier = moves_in_triton(
        score, factor, grad, grouping, sample, True, multipliers
    )
    rows = slice(sample.offset, None, sample.stride)
    expected = insertion_costs(scaled[rows], of_mask[rows], grouping.column, pattern)
    error = float((found - expected).abs().max())
    if multipliers:
        rival = rivalry(scaled, of_mask, grouping.column, pattern)
        rival = rival.unflatten(0, (sections, -1)).sum(1)
        none, alone = moves_in_triton(
            score, factor, grad, grouping, sample, False, True
        )
        wrong += none is not None
        for sums in (of_multiplier, alone):
            error = max(error, float((sums - rival).abs().max()))
    return wrong, error


if __name__ == "__main__":
    print(json.dumps([differences(*case) for case in CASES]))
