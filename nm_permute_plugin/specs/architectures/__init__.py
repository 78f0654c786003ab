# SPDX-License-Identifier: Apache-2.0
"""Permutation specs of known architectures: data only."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nm_permute_plugin._near_names import near_names
from nm_permute_plugin.specs.architectures.bert import BERT_CLASSES
from nm_permute_plugin.specs.architectures.layer_norm import LAYER_NORM_CLASSES
from nm_permute_plugin.specs.architectures.llama import LLAMA, LLAMA_CLASSES
from nm_permute_plugin.specs.architectures.moe import MOE_CLASSES
from nm_permute_plugin.specs.architectures.older import GPT2_CLASSES, opt
from nm_permute_plugin.specs.architectures.qwen_vl import QWEN_VL_CLASSES
from nm_permute_plugin.specs.architectures.vision import VISION_CLASSES
from nm_permute_plugin.specs.sizes import HeadDim
from nm_permute_plugin.specs.spec import Spec

__all__ = ["LLAMA", "SPECS", "head_dim_of", "spec_of"]

HEADS = re.compile(r"(For[A-Z]\w*|LMHeadModel|VisionModel|Model)$")
"""The part of a class's name that says its head, and nothing of its layers."""

SPECS: dict[str, Spec | Callable[[Any], Spec]] = {
    **LLAMA_CLASSES,
    **MOE_CLASSES,
    **GPT2_CLASSES,
    "OPTForCausalLM": opt,
    **LAYER_NORM_CLASSES,
    **BERT_CLASSES,
    **VISION_CLASSES,
    **QWEN_VL_CLASSES,
}
"""The spec of each class of transformers, by the class's name: a mapping, or a function of
the config where the config decides which axes move."""


def spec_of(model: nn.Module) -> Spec:
    """
    Return the spec of the model's class.

    :raises NotImplementedError: if the class is not known; nothing is guessed, also
        where the parameters have the names of a known class
    """
    name = type(model).__name__
    if name not in SPECS:
        near = _alike(name)
        raise NotImplementedError(
            f"no permutation spec for {name} is known, and none is guessed. Write one into "
            "a YAML file, a line a parameter and a word an axis, 'model.layers.{i}.mlp."
            "down_proj.weight: residual hidden.{i}' for example; `nm-permute spec MODEL "
            "--spec FILE` checks it, and `spec: FILE` in the recipe uses it. "
            + (f"Known classes with like names: {', '.join(near)}. " if near else "")
            + "`nm-permute spec --list` prints all known ones."
        )
    spec = SPECS[name]
    return spec if isinstance(spec, Mapping) else spec(model.config)


def _alike(name: str) -> list[str]:
    """Return the known classes of models with like names; all end as `ForCausalLM` does."""
    families: dict[str, list[str]] = {}
    for known in SPECS:
        families.setdefault(HEADS.sub("", known), []).append(known)
    family = HEADS.sub("", name)
    near = [families[found] for found in near_names(family, families, 3)]
    return [(near_names(name, known, 1) or known)[0] for known in near]


def head_dim_of(config: Any) -> HeadDim:
    """
    Return the channels of an attention head, from a transformers config, or None.

    For a model of images and text they are given by space: `value` and `value.vision`.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return _head_dim_of(config)
    of_tower = {
        "value": _head_dim_of(config.get_text_config()),
        "value.vision": _head_dim_of(vision),
    }
    return {name: dim for name, dim in of_tower.items() if dim is not None}


def _head_dim_of(config: Any) -> int | None:
    stated = getattr(config, "head_dim", None)
    heads = getattr(config, "num_attention_heads", None)
    heads = heads if heads is not None else getattr(config, "num_heads", None)
    if stated is not None or heads is None:
        return stated
    # Qwen2-VL calls the width of its tower embed_dim, and that of its output hidden_size.
    width = getattr(config, "embed_dim", None) or config.hidden_size
    return int(width) // int(heads)
