# SPDX-License-Identifier: Apache-2.0
"""A whole run on a tiny model, with fast settings of every method."""

import torch
from torch import Tensor, nn

from nm_permute_plugin.pruning.data import Data
from nm_permute_plugin.pruning.pipeline import Record, permute_and_prune
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.spec import ResolvedSpec, resolve

SWAPS = {"stages": "swaps", "steps": 3, "swaps": {"block_size": 16}}
FAST = {
    "learned": {"learn": SWAPS, "validation": {"every": 1}},
    "search": {"method": "search"},
    "identity": {"method": "identity"},
}
"""What a recipe says, by method."""


def settings_of(method: str, **changes: object) -> Settings:
    """Fast settings of a method."""
    return Settings.model_validate(FAST[method] | changes)


def go(
    model: nn.Module,
    data: Data,
    method: str = "search",
    options: dict[str, object] | None = None,
    **changes: object,
) -> Record:
    """
    The record of a whole run; the model is pruned.

    :param options: other arguments of ``permute_and_prune``
    :param changes: of the settings
    """
    given = {"prunable": linears(model)} | (options or {})
    settings = settings_of(method, **changes)
    if "resolved" not in given:
        given["resolved"] = resolved_of(model, given["prunable"], settings)
    return permute_and_prune(model, data=data, settings=settings, **given)


def resolved_of(
    model: nn.Module, prunable: list[str], settings: Settings | None = None
) -> ResolvedSpec:
    pattern = (settings or Settings()).pattern
    return resolve(model, spec_of(model), pattern, prunable, head_dim_of(model.config))


def linears(model: nn.Module) -> list[str]:
    """The linears that are pruned by default: all but the head."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: tensor.detach().clone() for name, tensor in named}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    assert [n for n in first if not torch.equal(first[n], second[n])] == []
