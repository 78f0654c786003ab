# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: a hidden space for every expert."""

from nm_permute_plugin.specs.architectures.llama import (
    ATTENTION,
    NORMED_ATTENTION,
    classes,
    decoder,
)
from nm_permute_plugin.specs.spec import Spec

# Experts are packed in transformers 5, and a linear each inside llm-compressor.
EXPERTS: Spec = {
    "gate.weight?": "_ residual",
    "experts.gate_up_proj?": "{e} hidden.{i}.{e}+hidden.{i}.{e} residual",
    "experts.down_proj?": "{e} residual hidden.{i}.{e}",
    "experts.{e}.{gate,up}_proj.weight?": "hidden.{i}.{e} residual",
    "experts.{e}.down_proj.weight?": "residual hidden.{i}.{e}",
}
DENSE: Spec = {
    "{gate,up}_proj.weight?": "hidden.{i} residual",
    "down_proj.weight?": "residual hidden.{i}",
}
SHARED: Spec = {
    "shared_expert_gate.weight?": "_ residual",
    "shared_expert.{gate,up}_proj.weight?": "hidden.{i}.shared residual",
    "shared_expert.down_proj.weight?": "residual hidden.{i}.shared",
}

MOE_CLASSES: dict[str, Spec] = {
    **classes("Mixtral", decoder(mlp=EXPERTS)),
    **classes("Qwen2Moe", decoder(ATTENTION, {**EXPERTS, **DENSE, **SHARED})),
    **classes("Qwen3Moe", decoder(NORMED_ATTENTION, {**EXPERTS, **DENSE})),
}
