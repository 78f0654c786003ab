# SPDX-License-Identifier: Apache-2.0
"""The names that modules have on disk: transformers saves many under older ones."""

from collections.abc import Iterable

import torch
from llmcompressor.modeling.moe.conversion_mappings import (
    set_save_conversion_mapping,
)
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from nm_permute_plugin.checkpoint.plan import experts_of

_UNPACKED = {
    (".experts.gate_up_proj",): ("gate_proj", "up_proj"),
    (".experts.down_proj",): ("down_proj",),
}


def name_experts_for_saving(model: PreTrainedModel) -> None:
    """
    Have unpacked experts saved under the names that the architecture's checkpoints use.

    llm-compressor calls them gate_proj, up_proj and down_proj. Where checkpoints have
    other names (Mixtral's w1, w3, w2), transformers would not load them again, and would
    start those experts from random weights.
    """
    renamings: list[WeightRenaming] = []
    for entry in get_model_conversion_mapping(model, add_legacy=False):
        targets = tuple(entry.target_patterns)
        if not isinstance(entry, WeightConverter):
            renamings.append(entry)
        elif targets in _UNPACKED:
            for theirs, ours in zip(
                entry.source_patterns, _UNPACKED[targets], strict=True
            ):
                name = theirs.removeprefix(".experts.*.").removesuffix(".weight")
                renamings.append(
                    WeightRenaming(
                        rf"\.experts\.(\d+)\.{name}\.", rf".experts.\1.{ours}."
                    )
                )
        else:
            return  # more than experts is converted: left to llm-compressor
    set_save_conversion_mapping(model, renamings)


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
