# SPDX-License-Identifier: Apache-2.0
"""What the tests of the recovery share: masks, corrupted weights, text."""

import torch
from torch import Tensor, nn

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.recover.rounding import Rounding
from nm_permute_plugin.pruning.recover.student import Student


def student_of(
    model: nn.Module, only: str = "", rounding: Rounding | None = None
) -> Student:
    """The student of magnitude masks of every linear but the head."""
    masks = {
        name: nm_mask(module.weight.detach().abs().float(), NMPattern(2, 4))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and only in name
    }
    return Student(model, masks, rounding and dict.fromkeys(masks, rounding))


def planted(model: nn.Module, noise: float = 0.3) -> Student:
    """
    A student whose masks cost the dense model nothing, and whose weights are wrong.

    Training can regain all that was lost.
    """
    student = student_of(model)
    generator = torch.Generator().manual_seed(3)
    for name, value in student.values.items():
        owner, _, leaf = name.rpartition(".")
        with torch.no_grad():
            getattr(model.get_submodule(owner), leaf).copy_(value)
        wrong = noise * torch.randn(value.shape, generator=generator).to(value)
        student.values[name] = value + wrong * value.abs()
    return student


def values_of(student: Student) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in student.values.items()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert set(first) == set(second)
    return [name for name in first if not torch.equal(first[name], second[name])]
