# SPDX-License-Identifier: Apache-2.0
"""
Print how far the Triton sum of moves is from the PyTorch one, a number a case, as JSON.

A process of its own: Triton decides whether to interpret when it is first imported.
"""

import json
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if __name__ == "__main__" and DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from nm_permute_plugin.training.relaxation import sum_moves  # noqa: E402

CASES = [
    (rows, blocks, size, m, step)
    for rows, blocks in ((1, 1), (9, 3))
    for size, m in ((16, 4), (12, 4), (48, 8))
    for step in (1, 2)
]


def difference(rows: int, blocks: int, size: int, m: int, step: int) -> float:
    """On every ``step``-th row of random scores."""
    from nm_permute_plugin.training.triton_moves import sum_moves_in_triton

    generator = torch.Generator(DEVICE).manual_seed(rows)

    def random(columns: int) -> torch.Tensor:
        shape = (rows * step, blocks, columns)
        return torch.randn(shape, generator=generator, device=DEVICE)

    score, grad = (random(size)[::step] for _ in range(2))
    threshold, loser = (random(size // m)[::step] for _ in range(2))
    expected = sum_moves(score.double(), grad.double(), threshold, loser)
    found = sum_moves_in_triton(score, grad, threshold, loser)
    return float((found - expected).abs().max())


if __name__ == "__main__":
    print(json.dumps([difference(*case) for case in CASES]))
