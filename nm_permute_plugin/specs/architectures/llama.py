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
# Norms of q and k, of one head or (OLMo-2) of all heads at once: their rows never move.
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
# OLMo-2 norms what a layer's parts write, not what they read: the same channels.
POST_NORMS: Spec = {"post_{attention,feedforward}_layernorm.weight": "residual"}


def decoder(
    attention: Spec = ATTENTION,
    mlp: Spec = MLP,
    norms: Spec = NORMS,
    last_norm: str = "norm.weight",
) -> Spec:
    """Give the lines of a decoder alone, from those of a layer's parts."""
    return {
        "embed_tokens.weight": "_ residual",
        **under("layers.{i}.self_attn.", attention),
        **under("layers.{i}.mlp.", mlp),
        **under("layers.{i}.", norms),
        last_norm: "residual",
    }


def causal(decoder: Spec, prefix: str = "model.") -> Spec:
    """Give the lines of a decoder with a head that predicts tokens."""
    return {**under(prefix, decoder), "lm_head.weight": "_ residual"}


def classes(
    name: str, decoder: Spec, prefix: str = "model.", labels: bool = True
) -> dict[str, Spec]:
    """
    Give a decoder's classes: with a head for tokens, one for labels, and without.

    :param prefix: where the decoder lies in the classes with a head
    :param labels: whether transformers has a class with a head for labels
    """
    scored = {**under(prefix, decoder), "score.weight": "_ residual"}
    return {
        f"{name}ForCausalLM": causal(decoder, prefix),
        **({f"{name}ForSequenceClassification": scored} if labels else {}),
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
    # Layers without rotary embeddings keep the rows of q and k in their places as well.
    **classes("SmolLM3", decoder()),
    **classes("Olmo2", decoder(NORMED_ATTENTION, norms=POST_NORMS)),
    # Its multipliers (of embeddings, residuals, attention, logits) are single numbers.
    **classes("Granite", decoder(), labels=False),
}
