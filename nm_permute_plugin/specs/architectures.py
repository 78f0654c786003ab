# SPDX-License-Identifier: Apache-2.0
"""Permutation specs of known architectures: data only."""

from typing import Any

from torch import nn

from nm_permute_plugin.specs.spec import Spec

LLAMA: Spec = {
    "model.embed_tokens.weight": "_ residual",
    "model.layers.{i}.input_layernorm.weight": "residual",
    # Rotary embeddings tie the rows of q and k in pairs: those rows never move.
    "model.layers.{i}.self_attn.{q,k}_proj.weight": "_ residual",
    "model.layers.{i}.self_attn.{q,k}_proj.bias?": "_",
    "model.layers.{i}.self_attn.v_proj.weight": "value.{i} residual",
    "model.layers.{i}.self_attn.v_proj.bias?": "value.{i}",
    "model.layers.{i}.self_attn.o_proj.weight": "residual value.{i}:heads",
    "model.layers.{i}.self_attn.o_proj.bias?": "residual",
    "model.layers.{i}.post_attention_layernorm.weight": "residual",
    "model.layers.{i}.mlp.{gate,up}_proj.weight": "hidden.{i} residual",
    "model.layers.{i}.mlp.{gate,up}_proj.bias?": "hidden.{i}",
    "model.layers.{i}.mlp.down_proj.weight": "residual hidden.{i}",
    "model.layers.{i}.mlp.down_proj.bias?": "residual",
    "model.norm.weight": "residual",
    "lm_head.weight": "_ residual",
}

QWEN3: Spec = {**LLAMA, "model.layers.{i}.self_attn.{q,k}_norm.weight": "_"}

SPECS: dict[str, Spec] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": QWEN3,
}


def spec_of(model: nn.Module) -> Spec:
    """
    The spec of the model's class.

    :raises NotImplementedError: for a class that is not known; nothing is guessed
    """
    name = type(model).__name__
    if name not in SPECS:
        raise NotImplementedError(
            f"no permutation spec for {name}; known: {', '.join(SPECS)}. Give one as "
            "`spec:` in the recipe: a line a parameter, a word an axis, for example "
            "'model.layers.{i}.mlp.down_proj.weight': 'residual hidden.{i}'."
        )
    return SPECS[name]


def head_dim_of(config: Any) -> int | None:
    """Channels of an attention head, from a transformers config; None if it has none."""
    stated = getattr(config, "head_dim", None)
    heads = getattr(config, "num_attention_heads", None)
    if stated is not None or heads is None:
        return stated
    return int(config.hidden_size) // int(heads)
