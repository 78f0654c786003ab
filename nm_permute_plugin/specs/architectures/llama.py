# SPDX-License-Identifier: Apache-2.0
"""Decoders with rotary embeddings and RMS norms: Llama and its relatives."""

from nm_permute_plugin.specs.architectures.building import (
    attention,
    mlp,
    output_fixed,
    under,
)
from nm_permute_plugin.specs.spec import Spec

# {q,k}_proj: "_ residual", v_proj: "value.{i} residual", o_proj: "residual value.{i}:heads"
ATTENTION: Spec = attention("{q,k}_proj", "v_proj", "o_proj", bias="?")
NORMED_ATTENTION: Spec = {**ATTENTION, "{q,k}_norm.weight": "_"}
FUSED_ATTENTION: Spec = {
    "qkv_proj.weight": "_:heads+_+value.{i} residual",  # q + k + v
    "o_proj.weight": "residual value.{i}:heads",
}

MLP: Spec = mlp("{gate,up}_proj", "down_proj", bias="?")
FUSED_MLP: Spec = {
    "gate_up_proj.weight": "hidden.{i}+hidden.{i} residual",
    "down_proj.weight": "residual hidden.{i}",
}

NORMS: Spec = {"{input,post_attention}_layernorm.weight": "residual"}
SANDWICH_NORMS: Spec = {**NORMS, "{pre,post}_feedforward_layernorm.weight": "residual"}


def decoder(attention: Spec = ATTENTION, mlp: Spec = MLP, norms: Spec = NORMS) -> Spec:
    """Give the lines of a decoder alone, from those of a layer's parts."""
    return {
        "embed_tokens.weight": "_ residual",
        **under("layers.{i}.self_attn.", attention),
        **under("layers.{i}.mlp.", mlp),
        **under("layers.{i}.", norms),
        "norm.weight": "residual",
    }


def causal(decoder: Spec) -> Spec:
    """Give the lines of a decoder with a head that predicts tokens."""
    return {**under("model.", decoder), "lm_head.weight": "_ residual"}


def classes(name: str, decoder: Spec) -> dict[str, Spec]:
    """Give a decoder's classes: with a head for tokens, one for labels, and without."""
    return {
        f"{name}ForCausalLM": causal(decoder),
        f"{name}ForSequenceClassification": {
            **under("model.", decoder),
            "score.weight": "_ residual",
        },
        f"{name}Model": output_fixed(decoder),
    }


LLAMA: Spec = causal(decoder())

LLAMA_CLASSES: dict[str, Spec] = {
    **classes("Llama", decoder()),
    **classes("Mistral", decoder()),
    **classes("Qwen2", decoder()),
    **classes("Qwen3", decoder(NORMED_ATTENTION)),
    **classes("Gemma2", decoder(norms=SANDWICH_NORMS)),
    # Gemma3Model and its classifier are those of images and text.
    "Gemma3ForCausalLM": causal(decoder(NORMED_ATTENTION, norms=SANDWICH_NORMS)),
    "Gemma3TextModel": output_fixed(decoder(NORMED_ATTENTION, norms=SANDWICH_NORMS)),
    **classes("Phi3", decoder(FUSED_ATTENTION, FUSED_MLP)),
}
