# SPDX-License-Identifier: Apache-2.0
"""
Print how far Triton's masks and gradients are from PyTorch's: a JSON object a case.

A process of its own: Triton decides whether to interpret when it is first imported.
"""

import json
import os
from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if __name__ == "__main__" and DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from nm_permute_plugin.maths.assignment import order_by  # noqa: E402
from nm_permute_plugin.maths.mask_gradients import score_gradient  # noqa: E402
from nm_permute_plugin.maths.pattern import NMPattern  # noqa: E402
from nm_permute_plugin.maths.permutation import from_blocks, invert  # noqa: E402
from nm_permute_plugin.maths.swaps import grouped_mask, move_costs  # noqa: E402

ALL, SOME = slice(None), slice(1, None, 3)
FEW, MANY = 2, 16
"""Groups of a tile: fewer than a row has, and more."""

CASES = [
    *(("2:4", 1, ALL, FEW), ("2:4", 1, SOME, MANY), ("2:4", 3, SOME, FEW)),
    *(("2:4", 3, ALL, MANY), ("2:4", 13, SOME, FEW)),
    *(("4:8", 1, SOME, FEW), ("4:8", 3, ALL, MANY)),
    *(("2:3", 1, ALL, MANY), ("2:3", 3, SOME, FEW)),
]
"""Patterns, row groups, samples of the rows, and groups of a tile."""

PROGRAMS = 8
"""So few that a program goes through several row groups where there are many, and so many
that a single row group is cut into shares."""

ROWS = {1: 17, 3: 9, 13: 5}
"""Of a row group, by how many there are; 17 are cut into shares that differ in length."""
BLOCKS, GROUPS = 2, 3


class Watched:
    """A kernel that keeps the arguments of its last launch."""

    def __init__(self, kernel: object) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: object) -> Callable[..., object]:
        def launch(*arguments: object, **constants: object) -> object:
            self.arguments = arguments
            return self.kernel[grid](*arguments, **constants)

        return launch


def compare(
    text: str, row_groups: int, sample: slice, tile_groups: int
) -> dict[str, float]:
    """Masks that differ, and the largest differences; some scores are equal, some are 0."""
    from nm_permute_plugin.maths import mask_gradients_triton as triton

    pattern = NMPattern.parse(text)
    triton.PROGRAMS, triton.TILE_GROUPS = PROGRAMS, tile_groups
    if not isinstance(triton.score_gradient_kernel, Watched):
        triton.score_gradient_kernel = Watched(triton.score_gradient_kernel)
    generator = torch.Generator().manual_seed(row_groups)
    size = GROUPS * pattern.m
    start = torch.randperm(BLOCKS * size, generator=generator).to(DEVICE)
    keys = torch.rand(BLOCKS, size, generator=generator).argsort()
    group_of = torch.arange(GROUPS).repeat_interleave(pattern.m)[keys].to(DEVICE)
    rows = ROWS[row_groups]
    shape = (row_groups * rows, BLOCKS * size)
    score = torch.rand(shape, generator=generator).mul(20).floor().to(DEVICE)
    grad = torch.randn(shape, generator=generator).bfloat16().to(DEVICE)
    factor = torch.randint(1, 4, (row_groups, shape[1]), generator=generator).float()
    factor = factor.to(DEVICE)

    def blocks(matrix: Tensor) -> Tensor:
        return matrix[:, start].unflatten(1, (BLOCKS, size))

    places = from_blocks(order_by(group_of))
    perm = start[places]
    scaled = (score.view(row_groups, rows, -1) * factor[:, None]).flatten(0, 1)
    mask = triton.mask_in_triton(score, factor, perm, pattern)
    expected = grouped_mask(blocks(scaled), group_of, pattern)
    wrong = int((blocks(mask) != expected).sum())

    found = triton.score_gradient_in_triton(score, factor, grad, perm, pattern)
    groups = [x[:, perm].unflatten(1, (-1, pattern.m)) for x in (scaled, grad)]
    of_scores = score_gradient(*groups, pattern).flatten(1)[:, invert(perm)]
    expected = of_scores.view(row_groups, rows, -1).sum(1)
    of_score = float((found - expected).abs().max())

    found = triton.move_costs_in_triton(
        score, grad, start, places, group_of, pattern, sample
    )
    sampled = blocks(score)[sample], blocks(grad)[sample]
    expected = move_costs(*sampled, group_of, pattern)
    of_moves = float((found - expected).abs().max())
    groups_per_part, shares = triton.score_gradient_kernel.arguments[8:10]
    return {
        "masks": wrong,
        "score_gradient": of_score,
        "move_costs": of_moves,
        "groups_per_part": groups_per_part,
        "shares": shares,
    }


if __name__ == "__main__":
    print(json.dumps([compare(*case) for case in CASES]))
