# SPDX-License-Identifier: Apache-2.0
"""Decoders with learned positions, layer norms and biases: GPT-2 and OPT."""

from typing import Any

from nm_permute_plugin.specs.architectures.building import output_fixed, under
from nm_permute_plugin.specs.spec import Spec

# Conv1D stores a weight as [in, out].
GPT2_DECODER: Spec = {
    "{wte,wpe}.weight": "_ residual",
    "h.{i}.{ln_1,ln_2}.{weight,bias}": "residual",
    "h.{i}.attn.c_attn.weight": "residual _:heads+_+value.{i}",
    "h.{i}.attn.c_attn.bias": "_:heads+_+value.{i}",
    "h.{i}.attn.c_proj.weight": "value.{i}:heads residual",
    "h.{i}.attn.c_proj.bias": "residual",
    "h.{i}.mlp.c_fc.weight": "residual hidden.{i}",
    "h.{i}.mlp.c_fc.bias": "hidden.{i}",
    "h.{i}.mlp.c_proj.weight": "hidden.{i} residual",
    "h.{i}.mlp.c_proj.bias": "residual",
    "ln_f.{weight,bias}": "residual",
}

OPT_DECODER: Spec = {
    "embed_tokens.weight": "_ residual",
    "embed_positions.weight": "_ residual",
    "layers.{i}.{self_attn,final}_layer_norm.{weight,bias}?": "residual",
    "layers.{i}.self_attn.{q,k}_proj.weight": "_ residual",
    "layers.{i}.self_attn.{q,k}_proj.bias?": "_",
    "layers.{i}.self_attn.v_proj.weight": "value.{i} residual",
    "layers.{i}.self_attn.v_proj.bias?": "value.{i}",
    "layers.{i}.self_attn.out_proj.weight": "residual value.{i}:heads",
    "layers.{i}.self_attn.out_proj.bias?": "residual",
    "layers.{i}.fc1.weight": "hidden.{i} residual",
    "layers.{i}.fc1.bias?": "hidden.{i}",
    "layers.{i}.fc2.weight": "residual hidden.{i}",
    "layers.{i}.fc2.bias?": "residual",
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
    """OPTForCausalLM; its embedding is the residual stream, or is projected into it."""
    projected = config.word_embed_proj_dim != config.hidden_size
    lines = {**OPT_DECODER, **(PROJECTED if projected else {})}
    head = "_ _embedding" if projected else "_ residual"
    return {**under("model.decoder.", lines), "lm_head.weight": head}


GPT2_CLASSES: dict[str, Spec] = {
    "GPT2LMHeadModel": {
        **under("transformer.", GPT2_DECODER),
        "lm_head.weight": "_ residual",
    },
    "GPT2ForSequenceClassification": {
        **under("transformer.", GPT2_DECODER),
        "score.weight": "_ residual",
    },
    "GPT2Model": output_fixed(GPT2_DECODER),
}
