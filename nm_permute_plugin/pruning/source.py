# SPDX-License-Identifier: Apache-2.0
"""What a run has to know of the folder that its model was loaded from, before any work."""

from collections.abc import Sequence
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from nm_permute_plugin.checkpoint.directory import read_json
from nm_permute_plugin.checkpoint.record import earlier_record
from nm_permute_plugin.checkpoint.source import (
    Source,
    check_files,
    folder_of,
    module_folders,
)
from nm_permute_plugin.checkpoint.unloaded import Unloaded, unloaded_tensors
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.grammar import FAMILIES
from nm_permute_plugin.specs.spec import ResolvedSpec, Space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST = 4
"""Weights that are fused along an axis hold this many vectors of the stream at most."""


def source_of(
    model: nn.Module, resolved: ResolvedSpec, settings: Settings
) -> Source | None:
    """
    Look at the folder of a model: its files, its tensors, the record of an earlier fold.

    :return: None for a model that came from no folder
    :raises ValueError: for tensors that transformers does not load and whose channels
        would move, and for a record of an earlier fold that does not fit
    :raises PermissionError: for a file that cannot be read
    """
    folder = folder_of(model)
    if folder is None:
        return None
    check_files(folder)
    moving = _moving(resolved, settings)
    hosted = cast("PreTrainedModel", model)
    unloaded = unloaded_tensors(folder, hosted)
    kind = type(model).__name__
    if not _is_all_loaded(folder, kind):
        # llm-compressor still copies what predicts further tokens.
        unloaded = [t for t in unloaded if _is_copied_by_host(t.name, hosted.config)]
    _refuse_touched(unloaded, resolved, moving, kind)
    _refuse_modules(module_folders(folder), moving)
    earlier = earlier_record(folder)
    carried = tuple(tensor.name for tensor in unloaded)
    if earlier is None:
        return Source(folder, carried)
    perms, report = earlier
    for name, perm in perms.items():
        space = resolved.spaces.get(name)
        if space is None or space.size != len(perm):
            raise ValueError(
                f"{folder}/nm_permute tells of an earlier fold of {len(perm)} channels of "
                f"space {name!r}, and the model has "
                f"{'no such space' if space is None else f'{space.size} of them'}: the "
                "record is of another model; remove that folder"
            )
    return Source(folder, carried, perms, report)


def _moving(resolved: ResolvedSpec, settings: Settings) -> list[Space]:
    """The spaces that may get a new order."""
    if settings.method == "identity":
        return []
    return [
        space
        for space in resolved.spaces.values()
        if space.consumers and space.family in settings.spaces
    ]


def _is_all_loaded(folder: Path, kind: str) -> bool:
    """
    Whether a model of the class should hold all tensors of its folder.

    It should not where another head was asked for, and that of the folder goes, nor where
    weights are quantized or sparse: they have other names then.
    """
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    stated = config.get("architectures")
    others = isinstance(stated, list) and stated and kind not in stated
    return not others and not config.get("quantization_config")


def _is_copied_by_host(name: str, config: Any) -> bool:
    text = config.get_text_config()
    counts = ("num_mtp_layers", "mtp_num_hidden_layers")
    return name.startswith("mtp") and any(getattr(text, c, 0) for c in counts)


def _refuse_touched(
    unloaded: Sequence[Unloaded],
    resolved: ResolvedSpec,
    moving: Sequence[Space],
    kind: str,
) -> None:
    scopes = {space.name: _scope(space, resolved) for space in moving}
    touched = {
        tensor.name: space
        for tensor in unloaded
        for space in moving
        if _is_touched(tensor, space, scopes[space.name])
    }
    if not touched:
        return
    name, space = next(iter(touched.items()))
    shape = next(tensor.shape for tensor in unloaded if tensor.name == name)
    others = f" and {len(touched) - 1} tensors more" if len(touched) > 1 else ""
    raise ValueError(
        f"the model's folder holds {name} {list(shape)}{others}, which transformers does "
        f"not load into {kind}: it would keep the old channel order while the channels of "
        f"space {space.name} move. Write "
        f"{_remedy({s.family for s in touched.values()})} in the recipe; or, where "
        "nothing needs these tensors, load the model, save it anew without them and prune "
        "that."
    )


def _refuse_modules(modules: dict[str, list[str]], moving: Sequence[Space]) -> None:
    weights = [f"{name}/{file}" for name, files in modules.items() for file in files]
    if weights and any(space.family == "residual" for space in moving):
        raise ValueError(
            f"modules.json of the model's folder names {weights[0]}, which reads the "
            "model's outputs: its columns would keep the old channel order while the "
            f"channels of space residual move. Write {_remedy({'residual'})} in the recipe."
        )


def _remedy(families: set[str]) -> str:
    rest = [family for family in reversed(FAMILIES) if family not in families]
    return f"`spaces: [{', '.join(reversed(rest))}]`" if rest else "`method: identity`"


def _scope(space: Space, resolved: ResolvedSpec) -> str:
    """The module that holds all parameters of a space; nothing for the residual stream."""
    if space.family == "residual":
        return ""
    names = [
        name.split(".")[:-1]
        for parameter in resolved.parameters
        if space.name in parameter.spaces
        for name in parameter.names
    ]
    return ".".join([*commonprefix(names), ""])


def _is_touched(tensor: Unloaded, space: Space, scope: str) -> bool:
    """Whether a tensor has an axis as long as a space, and lies where the space does."""
    vectors = [size / space.size for size in tensor.shape]
    return tensor.place.startswith(scope) and any(
        count in range(1, _MOST + 1) for count in vectors
    )
