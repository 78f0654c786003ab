# SPDX-License-Identifier: Apache-2.0
"""Fold a model, and see that it still computes the same."""

from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import torch
from loguru import logger
from torch import Tensor, nn

from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import Batch, first_sample, forward, on_device
from nm_permute_plugin.pruning.running.loss import answer, refuse_not_finite
from nm_permute_plugin.pruning.running.masked import evaluating
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.specs.exactness import fold_checked, random_perms
from nm_permute_plugin.specs.fold import Write, fold, invert_all, write_in_place
from nm_permute_plugin.specs.spec import ResolvedSpec

P = ParamSpec("P")
T = TypeVar("T")

FOLD_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest relative change of the outputs that rounding explains, by dtype; 0.05 below."""


def fold_model(
    model: nn.Module,
    resolved: ResolvedSpec,
    perms: Mapping[str, Permutation],
    teacher: Teacher | None,
    sample: Batch,
    write: Write,
) -> float:
    """
    Fold, have the teacher follow, and return the relative change of the outputs.

    :param perms: by space, ``new[j] = old[perm[j]]``
    :param teacher: keeps hidden states of the unfolded model; None if there is none
    :param sample: a batch, whose first row is compared
    :param write: how a parameter's new value is stored
    :raises ValueError: if the outputs are not finite
    :raises RuntimeError: if the fold changes the function of the model, which is as it was
    """

    batch = on_device(first_sample(sample), model)

    def outputs() -> dict[str, Tensor]:
        found = answer(forward(model, batch))
        refuse_not_finite(found)
        return {"outputs": found}

    if not perms:
        outputs()
        return 0.0
    tolerance = FOLD_TOLERANCE.get(next(model.parameters()).dtype, 0.05)
    moving = sum(bool(of.spaces & perms.keys()) for of in resolved.parameters)
    # The model runs once before the fold, and once after it.
    with ranks.bar(desc="Folding the permutation", total=moving + 2) as bar:
        error = fold_checked(
            model,
            resolved,
            perms,
            _counted(outputs, bar),
            tolerance,
            _counted(write, bar),
        )
    logger.info(f"Folded {len(perms)} permutations; outputs moved by {error:.1e}")
    if teacher is not None:
        teacher.fold(_entering(model, resolved, perms))
    return error


def _counted(call: Callable[P, T], bar: ranks.Bar) -> Callable[P, T]:
    """The same function, whose bar counts its calls."""

    def calling(*given: P.args, **named: P.kwargs) -> T:
        result = call(*given, **named)
        bar.update()
        return result

    return calling


def refuse_inexact(
    model: nn.Module,
    resolved: ResolvedSpec,
    sample: Batch,
    write: Write = write_in_place,
) -> None:
    """
    Try a spec with random permutations, before any work; the weights stay as they are.

    :raises RuntimeError: if a fold changes the function of the model
    """
    perms = random_perms(resolved)
    with evaluating(model):
        fold_model(model, resolved, perms, None, sample, write)
    fold(model, resolved, invert_all(perms), write)


def _entering(
    model: nn.Module, resolved: ResolvedSpec, perms: Mapping[str, Permutation]
) -> Tensor | None:
    """
    The permutation of the channels that enter the output layer, if one space orders
    them.
    """
    find = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    names = {
        f"{name}.weight" for name, module in model.named_modules() if module is head
    }
    for parameter in resolved.parameters:
        if names & set(parameter.names):
            (part, *others) = parameter.matrices[0][-1]
            if others or part.heads:
                return None
            if part.space is None or part.space not in perms:
                return torch.arange(part.length)
            return perms[part.space]
    return None
