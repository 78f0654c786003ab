# SPDX-License-Identifier: Apache-2.0
"""Which modules the settings mean, and which cannot be pruned."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nm_permute_plugin._near_names import near_names
from nm_permute_plugin.checkpoint.config import AskedFormat, matches
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.arguments import refuse_accelerated
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.conv1d import (
    CONV1D,
    is_linear,
    is_transposed,
    weight_of,
)
from nm_permute_plugin.specs.spec import ResolvedSpec


def match_linears(
    model: nn.Module, targets: Sequence[str], ignore: Sequence[str]
) -> list[str]:
    """
    The names of the linears to prune; the target ``Linear`` means Conv1D as well.

    :param targets: module names, class names, or ``re:`` patterns
    :param ignore: likewise, the modules that stay dense
    :raises ValueError: if a target or an ignore matches nothing, if a target is no
        linear, if nothing is left, or for a model with adapters of PEFT or one that is
        accelerated
    """
    modules = dict(model.named_modules())
    refuse_adapters(model)
    refuse_accelerated(model)
    if "Linear" in targets and any(map(is_transposed, modules.values())):
        has_linears = any(means("Linear", n, m) for n, m in modules.items())
        targets = [t for t in targets if has_linears or t != "Linear"] + [CONV1D]
    default = Settings.model_fields["ignore"].default
    for entry in ignore if tuple(ignore) != default else ():
        if not any(means(entry, n, m) for n, m in modules.items()):
            raise ValueError(
                f"`ignore`: {entry!r} matches no module of the model"
                f"{_what_matches(entry, modules)}"
            )
    for entry in targets:
        if not any(means(entry, n, m) for n, m in modules.items()):
            raise ValueError(
                f"`targets`: {entry!r} matches no module of the model"
                f"{_what_matches(entry, modules)}"
            )
    matched = [
        name
        for name, module in modules.items()
        if any(means(entry, name, module) for entry in targets)
        and not any(means(entry, name, module) for entry in ignore)
    ]
    for name in matched:
        if not is_linear(modules[name]):
            raise ValueError(
                f"target {name} is a {type(modules[name]).__name__}; only Linear and "
                "Conv1D modules can be pruned N:M. Narrow `targets`, or add it to "
                "`ignore`."
            )
    if not matched:
        raise ValueError(
            f"`ignore` {list(ignore)} takes away all that `targets` {list(targets)} "
            "matches"
        )
    return matched


def linears_among(
    model: nn.Module, targets: Sequence[str], ignore: Sequence[str]
) -> list[str]:
    """The linears that ``match_linears`` would find, where targets may match nothing."""
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and any(
            means(entry, name, module) or (entry == "Linear" and is_transposed(module))
            for entry in targets
        )
        and not any(means(entry, name, module) for entry in ignore)
    ]


def refuse_adapters(model: nn.Module) -> None:
    """
    Refuse a model that PEFT has wrapped: its weights lie in adapters as well.

    :raises ValueError: naming the first wrapped module
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"the model has PEFT adapters ({name or type(module).__name__}): merge "
                "them into its weights first, `model = peft_model.merge_and_unload()`, "
                "and prune the result"
            )


def refuse_tied(model: nn.Module, names: Sequence[str]) -> None:
    """
    Refuse to prune a table of embeddings under another name.

    :raises ValueError: if one of the modules shares its weight with embeddings
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name in names:
        if id(model.get_submodule(name).weight) in tables:
            raise ValueError(
                f"{name} shares its weight with the embeddings, which would be pruned "
                f"with it; add {name!r} to `ignore`, or untie them"
            )


def refuse_packed(resolved: ResolvedSpec) -> None:
    """
    Refuse packed stacks of experts, which would stay dense in silence.

    :raises ValueError: naming the first
    """
    for parameter in resolved.parameters:
        if parameter.packed:
            raise ValueError(
                f"{parameter.names[0]} packs the weights of experts, and N:M masks are "
                "for Linear modules. `oneshot` unpacks it; without, call llm-compressor's "
                "linearize_moe(model) first."
            )


def refuse_sparse(model: nn.Module, names: Sequence[str], pattern: NMPattern) -> None:
    """
    Refuse a model whose weights are zero already where a mask would put zeros.

    :raises ValueError: naming the first linear with as many zeros as the pattern asks for
    """
    for name in names:
        weight = weight_of(model.get_submodule(name))
        zeros = float((weight == 0).float().mean())
        if zeros >= 1 - pattern.density:
            raise ValueError(
                f"{name} is sparse already: {zeros:.0%} of its weights are zero. Start "
                "from the dense model, or add the layer to `ignore`."
            )


def transposed_of(
    model: nn.Module, names: Sequence[str], asked: AskedFormat = "auto"
) -> list[str]:
    """
    Those of the linears that are stored as [in, out], which no sparse format holds.

    :param asked: the format of the settings
    :raises ValueError: if it is a sparse one, and there are such linears
    """
    found = [name for name in names if is_transposed(model.get_submodule(name))]
    if found and asked not in ("auto", "dense"):
        raise ValueError(
            f"format {asked} cannot hold {found[0]}: it is a Conv1D, which stores its "
            "weight as [in, out], and sparse formats hold [out, in]. Use format: dense, "
            "or leave `format` out."
        )
    return found


def base_model_of(model: Any) -> str:
    """The hub name of a model, or the name of its folder; no path of this machine."""
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return Path(name).resolve().name if Path(name).exists() else name


def _what_matches(entry: str, modules: Mapping[str, nn.Module]) -> str:
    """Say what would match, for an entry that matches no module."""
    if "*" in entry and not entry.startswith("re:"):
        pattern = re.escape(entry).replace(r"\*", ".*")
        return f"; a pattern starts with 're:': did you mean 're:{pattern}'?"
    word = entry.removeprefix("re:").strip(".*^$")
    if any(f".{word}." in f".{name}." for name in modules if word):
        return f"; a name is whole, 're:' begins a pattern: did you mean 're:.*{word}'?"
    whole = {*modules, *(type(module).__name__ for module in modules.values())}
    split = [name.split(".") for name in modules]
    parts = {part for names in split for part in names if part.isidentifier()}
    parts |= {".".join(names[-2:]) for names in split}
    for near in near_names(word, sorted(whole | parts), 1):
        return f"; did you mean {near if near in whole else f're:.*{near}'!r}?"
    example = max(modules, key=lambda name: name.count("."))
    return (
        f"; give a whole name such as {example!r}, a class such as 'Linear', or a "
        "pattern that starts with 're:'"
    )


def means(entry: str, name: str, module: nn.Module) -> bool:
    """Whether an entry of a list of targets means a module, by its name or its classes."""
    return any(matches(entry, name, kind.__name__) for kind in type(module).__mro__)
