# SPDX-License-Identifier: Apache-2.0
"""Every class that has a spec folds exactly, in every shape that matters."""

import pytest
import torch
from torch import nn
from zoo import ZOO, tiny

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs.architectures import SPECS, head_dim_of, spec_of
from nm_permute_plugin.specs.exactness import (
    fold_checked,
    outputs_of,
    random_batch,
    random_perms,
)
from nm_permute_plugin.specs.fold import fold, invert_all
from nm_permute_plugin.specs.spec import ResolvedSpec, Spec, resolve

TWO_OF_FOUR = NMPattern(2, 4)
EVERY = pytest.mark.parametrize(("name", "config", "options"), ZOO)


def resolved_of(
    model: nn.Module, spec: Spec | None = None, prunable: list[str] | None = None
) -> ResolvedSpec:
    spec = spec_of(model) if spec is None else spec
    head_dim = head_dim_of(model.config)
    return resolve(model, spec, TWO_OF_FOUR, prunable or [], head_dim)


def test_the_zoo_holds_every_class() -> None:
    """A classifier is its decoder with a head of one line, which Llama's case has."""
    names = {case.values[0] for case in ZOO}
    decoders = {name.removesuffix("ForSequenceClassification") for name in SPECS}
    labels = {f"{name}ForSequenceClassification" for name in decoders}
    assert set(SPECS) - labels <= names


@EVERY
def test_a_fold_leaves_the_outputs(name: str, config: str, options: dict) -> None:
    model = tiny(name, config, options, torch.float64)
    resolved = resolved_of(model)
    batch = random_batch(model)
    perms = random_perms(resolved)
    fold_checked(model, resolved, perms, lambda: outputs_of(model, batch), 1e-10)


@EVERY
def test_the_inverse_fold_is_bitwise(name: str, config: str, options: dict) -> None:
    model = tiny(name, config, options, torch.bfloat16)
    resolved, perms = resolved_of(model), random_perms(resolved_of(model))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fold(model, resolved, perms)
    moved = {p.names[0] for p in resolved.parameters if p.spaces}
    state = model.state_dict()
    assert {key for key in moved if torch.equal(state[key], before[key])} == set()
    fold(model, resolved, invert_all(perms))
    state = model.state_dict()
    assert [key for key in before if not torch.equal(state[key], before[key])] == []
