# SPDX-License-Identifier: Apache-2.0
"""The names that modules have on disk: transformers saves many under older ones."""

import re
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

_EXPERT = re.compile(r"\.experts\.\d+\.")


def experts_of(names: Iterable[str]) -> list[str]:
    """Those that are linears of experts, which transformers keeps packed."""
    return [name for name in names if _EXPERT.search(name)]


def saved_names(model: PreTrainedModel, modules: Iterable[str]) -> list[str]:
    """
    What ``save_pretrained`` calls the modules, in their order.

    :raises ValueError: for experts whose saved names transformers does not load again
    """
    modules = list(modules)
    marks = {f"{name}.weight": torch.empty(1, device="meta") for name in modules}
    renamed = revert_weight_conversion(model, marks)
    saved = {id(mark): name for name, mark in renamed.items()}
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
