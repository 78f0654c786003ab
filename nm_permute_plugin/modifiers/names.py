# SPDX-License-Identifier: Apache-2.0
"""Give unpacked experts the names on disk that transformers loads again."""

from llmcompressor.modeling.moe.conversion_mappings import (
    set_save_conversion_mapping,
)
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

_UNPACKED = {
    (".experts.gate_up_proj",): ("gate_proj", "up_proj"),
    (".experts.down_proj",): ("down_proj",),
}


def name_experts_for_saving(model: PreTrainedModel) -> None:
    """
    Has unpacked experts saved under the names that the architecture's checkpoints use.

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
