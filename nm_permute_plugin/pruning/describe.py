# SPDX-License-Identifier: Apache-2.0
"""Say in words what settings ask for, and what they leave alone."""

import json
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.pruning.targets import means
from nm_permute_plugin.specs.conv1d import is_linear, weight_of
from nm_permute_plugin.specs.layer_names import merged


def changed_settings(settings: Settings) -> dict[str, object]:
    """
    The settings that are not the defaults, by their paths.

    >>> changed_settings(Settings(batch_size=1, learn={"steps": 20}))
    {'batch_size': 1, 'learn.steps': 20}
    """
    now = settings.model_dump(mode="json", include=set(Settings.model_fields))
    return dict(_changed(now, _DEFAULTS))


def describe(
    model: nn.Module, prunable: Sequence[str], settings: Settings
) -> list[str]:
    """
    Say how much is pruned, which linears stay dense and why, and what is not a default.

    :param model: its parameters may be on the device meta
    :param prunable: the linears that are pruned
    """
    every = sum(parameter.numel() for parameter in model.parameters())
    pruned = sum(weight_of(model.get_submodule(n)).numel() for n in prunable)
    changed = [
        f"{path}: {value if isinstance(value, str) else json.dumps(value)}"
        for path, value in changed_settings(settings).items()
    ]
    return [
        f"{settings.mask_structure} in {len(prunable)} linears, with "
        f"{pruned:,} of the model's {every:,} weights",
        *stays_dense(model, prunable, settings),
        "settings that are not the defaults: " + "; ".join(changed)
        if changed
        else "all settings are the defaults",
    ]


def stays_dense(
    model: nn.Module, prunable: Sequence[str], settings: Settings
) -> list[str]:
    """Say of every linear that stays dense why it does; layers alike are in one line."""
    there = set(prunable)
    lines = []
    for name, module in model.named_modules():
        if not is_linear(module) or name in there:
            continue
        ignored = [e for e in settings.ignore if means(e, name, module)]
        why = f"`ignore` names {ignored[0]}" if ignored else "no target names it"
        lines.append(f"{name} stays dense: {why}")
    return merged(lines)


def _changed(
    now: Mapping[str, object], default: Mapping[str, object], prefix: str = ""
) -> Iterator[tuple[str, object]]:
    for name, value in now.items():
        before = default[name]
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from _changed(value, before, f"{prefix}{name}.")
        elif value != before:
            yield f"{prefix}{name}", value


_DEFAULTS = Settings().model_dump(mode="json")
