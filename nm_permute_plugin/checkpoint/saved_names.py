# SPDX-License-Identifier: Apache-2.0
"""Find the names that modules have on disk: transformers saves many under older ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from nm_permute_plugin.checkpoint.plan import experts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def saved_names(model: PreTrainedModel, modules: Iterable[str]) -> list[str]:
    """
    Returns what ``save_pretrained`` calls the modules, in their order.

    :raises ValueError: for a module that is merged, split or copied when it is saved, or
        for experts whose saved names transformers does not load again
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
        revert_weight_conversion,
    )

    modules = list(modules)
    marks = {f"{name}.weight": torch.empty(1, device="meta") for name in modules}
    try:
        renamed = revert_weight_conversion(model, marks)
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(_converted(model, f"a pruned module ({error})")) from error
    saved = {id(mark): name for name, mark in renamed.items()}
    for name, mark in marks.items():
        if id(mark) not in saved:
            raise ValueError(_converted(model, name.removesuffix(".weight")))
    names = [saved[id(mark)].removesuffix(".weight") for mark in marks.values()]
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    for name in experts_of(names):
        _, known = rename_source_key(f"{name}.weight", renamings, converters)
        if known is None:
            raise ValueError(
                f"llm-compressor saves the experts of {type(model).__name__} under names "
                f"like {name}, which transformers does not load: they would come back "
                "random. This architecture cannot be pruned through oneshot yet."
            )
    return names


def _converted(model: PreTrainedModel, module: str) -> str:
    return (
        f"transformers merges, splits or copies the weight of {module} when it saves a "
        f"{type(model).__name__}, so its pattern cannot be checked in the checkpoint. "
        "Add the module to `ignore`."
    )
