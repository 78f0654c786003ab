# SPDX-License-Identifier: Apache-2.0
"""Which modules a recipe means, and what the model is called."""

from pathlib import Path

from compressed_tensors.utils import match_name, match_named_modules
from torch import nn
from transformers import PreTrainedModel

from nm_permute_plugin.checkpoint.check import AskedFormat
from nm_permute_plugin.specs.spec import ResolvedSpec

DEFAULT_IGNORE = ["lm_head"]


def match_linears(model: nn.Module, targets: list[str], ignore: list[str]) -> list[str]:
    """
    The names of the linears to prune.

    :raises ValueError: if a target or an ignore matches nothing, if a target is no
        Linear, or if nothing is left
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in ignore if ignore != DEFAULT_IGNORE else ():
        known = any(match_name(name, pattern) for name in names)
        if not known and not list(match_named_modules(model, [pattern])):
            raise ValueError(
                f"ignore pattern {pattern!r} matches no module of the model; module "
                f"names look like {_example(names)!r}, patterns start with 're:'"
            )
    for pattern in targets:
        if not list(match_named_modules(model, [pattern])):
            raise ValueError(
                f"target {pattern!r} matches no module of the model; use 'Linear', a "
                f"name like {_example(names)!r}, or a pattern that starts with 're:'"
            )
    for name, _ in match_named_modules(model, ["Conv1D"], ignore):
        raise ValueError(
            f"{name} is a Conv1D, which stores its weight as [in, out]; N:M masks are for "
            "Linear modules. Its channels can be reordered (`nm-permute spec`), not "
            f"pruned; add it to `ignore`, 're:.*{name.rpartition('.')[2]}$' for example."
        )
    matched = list(match_named_modules(model, targets, ignore))
    for name, module in matched:
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"target {name} is a {type(module).__name__}; only Linear modules can "
                "be pruned N:M. Narrow `targets`, or add it to `ignore`."
            )
    if not matched:
        raise ValueError(
            f"`ignore` {ignore} takes away all that `targets` {targets} matches"
        )
    return [name for name, _ in matched]


def refuse_tied(model: PreTrainedModel, names: list[str]) -> None:
    """
    See that no module to prune is a table of embeddings, under another name.

    :raises ValueError: if one is
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
    See that no packed stack of experts stays dense in silence.

    :raises ValueError: naming the first
    """
    for parameter in resolved.parameters:
        if parameter.packed:
            raise ValueError(
                f"{parameter.names[0]} packs the weights of experts, and N:M masks are "
                "for Linear modules. `oneshot` unpacks it; without, call llm-compressor's "
                "linearize_moe(model) first."
            )


def dense_for_experts(asked: AskedFormat) -> AskedFormat:
    """
    How a checkpoint of experts is stored: no reader of the sparse formats packs them.

    :raises ValueError: if a sparse format is asked for
    """
    if asked not in ("auto", "dense"):
        raise ValueError(
            f"format {asked} cannot hold a mixture of experts: transformers packs the "
            "experts while loading, which knows no sparse weights; use format: dense"
        )
    return "dense"


def base_model_of(model: nn.Module) -> str:
    """The hub name of a model, or the name of its folder; no path of this machine."""
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return Path(name).resolve().name if Path(name).exists() else name


def _example(names: list[str]) -> str:
    return max(names, key=lambda name: name.count("."))
