# SPDX-License-Identifier: Apache-2.0
"""
Decoders with layer norms: GPT-NeoX, Falcon, StableLM, Starcoder2 and Cohere.

A layer norm's mean and variance do not see the order of the channels. Attention and MLP
may both read one stream and add to it at once (a parallel residual): the axes are the same.
"""

from nm_permute_plugin.specs.architectures.building import (
    linear,
    mlp,
    under,
)
from nm_permute_plugin.specs.architectures.llama import (
    ATTENTION,
    classes,
    decoder,
)
from nm_permute_plugin.specs.spec import Spec

# A key/value head's queries, key and value, then those of the next head. Falcon's three
# layouts are all of this form: several queries a head, one, or all heads share one value.
INTERLEAVED: Spec = {
    **linear("query_key_value", "_:heads|_|value.{i} residual", bias="?"),
    **linear("dense", "residual value.{i}:heads", bias="?"),
}

GPT_NEOX: Spec = {
    "embed_in.weight": "_ residual",
    "layers.{i}.{input,post_attention}_layernorm.{weight,bias}": "residual",
    **under("layers.{i}.attention.", INTERLEAVED),
    **under("layers.{i}.mlp.", mlp("dense_h_to_4h", "dense_4h_to_h")),
    "final_layer_norm.{weight,bias}": "residual",
}

FALCON: Spec = {
    "word_embeddings.weight": "_ residual",
    # One norm for both parts or one for each, by the config.
    "h.{i}.{input,post_attention}_layernorm.{weight,bias}?": "residual",
    "h.{i}.{ln_attn,ln_mlp}.{weight,bias}?": "residual",
    **under("h.{i}.self_attention.", INTERLEAVED),
    **under("h.{i}.mlp.", mlp("dense_h_to_4h", "dense_4h_to_h", bias="?")),
    "ln_f.{weight,bias}": "residual",
}

LAST_NORM = "norm.{weight,bias}"
STABLELM: Spec = decoder(
    # A norm for every head of q and k, whose rows never move.
    attention={**ATTENTION, "{q,k}_layernorm.norms.{head}.weight?": "_"},
    # The second is absent where the residual is parallel.
    norms={"{input,post_attention}_layernorm.{weight,bias}?": "residual"},
    last_norm=LAST_NORM,
)
STARCODER2: Spec = decoder(
    mlp=mlp("c_fc", "c_proj", bias="?"),
    norms={"{input,post_attention}_layernorm.{weight,bias}": "residual"},
    last_norm=LAST_NORM,
)

# Layer norms without biases; the head is the table of embeddings, its scale one number.
COHERE_NORMS: Spec = {"input_layernorm.weight": "residual"}
COHERE: Spec = decoder(
    # [heads, channels]: weights of q and k, whose rows never move.
    attention={**ATTENTION, "{q,k}_norm.weight?": "_ _"},
    norms=COHERE_NORMS,
)

LAYER_NORM_CLASSES: dict[str, Spec] = {
    **classes("GPTNeoX", GPT_NEOX, prefix="gpt_neox."),
    **classes("Falcon", FALCON, prefix="transformer."),
    **classes("StableLm", STABLELM),
    **classes("Starcoder2", STARCODER2),
    **classes("Cohere", COHERE, labels=False),
    **classes("Cohere2", decoder(norms=COHERE_NORMS), labels=False),
}
