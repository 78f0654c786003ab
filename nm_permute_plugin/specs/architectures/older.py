# SPDX-License-Identifier: Apache-2.0
"""Decoders with learned positions, layer norms and biases: GPT-2 and OPT."""

from typing import Any

from nm_permute_plugin.specs.architectures.building import (
    attention,
    mlp,
    output_fixed,
    under,
)
from nm_permute_plugin.specs.spec import Spec


def conv1d(name: str, words: str) -> Spec:
    """Give a linear's lines from its words [out, in]; it stores its weight as [in, out]."""
    out, into = words.split()
    return {f"{name}.weight": f"{into} {out}", f"{name}.bias": out}


GPT2_DECODER: Spec = {
    "{wte,wpe}.weight": "_ residual",
    "h.{i}.{ln_1,ln_2}.{weight,bias}": "residual",
    **conv1d("h.{i}.attn.c_attn", "_:heads+_+value.{i} residual"),
    **conv1d("h.{i}.attn.c_proj", "residual value.{i}:heads"),
    **conv1d("h.{i}.mlp.c_fc", "hidden.{i} residual"),
    **conv1d("h.{i}.mlp.c_proj", "residual hidden.{i}"),
    "ln_f.{weight,bias}": "residual",
}

ATTENTION: Spec = attention("{q,k}_proj", "v_proj", "out_proj", bias="?")
OPT_DECODER: Spec = {
    "embed_tokens.weight": "_ residual",
    "embed_positions.weight": "_ residual",
    "layers.{i}.{self_attn,final}_layer_norm.{weight,bias}?": "residual",
    **under("layers.{i}.self_attn.", ATTENTION),
    **under("layers.{i}.", mlp("fc1", "fc2", bias="?")),
    # Absent in the 350M model, which norms after the sum.
    "final_layer_norm.{weight,bias}?": "residual",
}

# The 350M model embeds into fewer channels than it computes with.
PROJECTED: Spec = {
    "embed_tokens.weight": "_ _embedding",
    "project_in.weight": "residual _embedding",
    "project_out.weight": "_embedding residual",
}


def opt(config: Any) -> Spec:
    """Give OPTForCausalLM's lines; some models project their embeddings."""
    projected = config.word_embed_proj_dim != config.hidden_size
    lines = {**OPT_DECODER, **(PROJECTED if projected else {})}
    head = "_ _embedding" if projected else "_ residual"
    return {**under("model.decoder.", lines), "lm_head.weight": head}


GPT2_TRUNK: Spec = under("transformer.", GPT2_DECODER)
GPT2_CLASSES: dict[str, Spec] = {
    "GPT2LMHeadModel": {**GPT2_TRUNK, "lm_head.weight": "_ residual"},
    "GPT2ForSequenceClassification": {**GPT2_TRUNK, "score.weight": "_ residual"},
    "GPT2Model": output_fixed(GPT2_DECODER),
}
