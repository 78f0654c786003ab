# SPDX-License-Identifier: Apache-2.0
"""Which modules a recipe means, and what the model is called."""

from pathlib import Path

from compressed_tensors.utils import match_name, match_named_modules
from torch import nn
from transformers import PreTrainedModel

from nm_permute_plugin.checkpoint.config import AskedFormat
from nm_permute_plugin.specs.conv1d import CONV1D, is_linear, is_transposed
from nm_permute_plugin.specs.spec import ResolvedSpec

DEFAULT_IGNORE = ["lm_head"]


def match_linears(model: nn.Module, targets: list[str], ignore: list[str]) -> list[str]:
    """
    The names of the linears to prune; the target ``Linear`` means Conv1D as well.

    :raises ValueError: if a target or an ignore matches nothing, if a target is no
        linear, or if nothing is left
    """
    if "Linear" in targets and any(map(is_transposed, model.modules())):
        linears = list(match_named_modules(model, ["Linear"]))
        targets = [x for x in targets if linears or x != "Linear"] + [CONV1D]
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
    matched = list(match_named_modules(model, targets, ignore))
    for name, module in matched:
        if not is_linear(module):
            raise ValueError(
                f"target {name} is a {type(module).__name__}; only Linear and Conv1D "
                "modules can be pruned N:M. Narrow `targets`, or add it to `ignore`."
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


def transposed_of(
    model: nn.Module, names: list[str], asked: AskedFormat = "auto"
) -> list[str]:
    """
    Those of the linears that are stored as [in, out], which no sparse format holds.

    :param asked: the format of the recipe
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


def base_model_of(model: nn.Module) -> str:
    """The hub name of a model, or the name of its folder; no path of this machine."""
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return Path(name).resolve().name if Path(name).exists() else name


def _example(names: list[str]) -> str:
    return max(names, key=lambda name: name.count("."))
