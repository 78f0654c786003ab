# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL and Qwen2.5-VL: a tower of images that writes into a language model."""

from nm_permute_plugin.specs.architectures.building import linear, mlp, of_tower, under
from nm_permute_plugin.specs.architectures.llama import MLP as GATED_MLP
from nm_permute_plugin.specs.architectures.llama import decoder
from nm_permute_plugin.specs.spec import Spec

BLOCK: Spec = {
    "{norm1,norm2}.{weight,bias}?": "residual",
    **linear("attn.qkv", "_:heads+_+value.{i} residual"),
    **linear("attn.proj", "residual value.{i}:heads"),
}
MERGER: Spec = {
    "ln_q.{weight,bias}?": "residual.vision",
    # It reads four neighbouring patches as one vector, patch after patch.
    **linear("mlp.0", "hidden.merger " + "+".join(["residual.vision"] * 4)),
    # Its output stands among the text's embeddings: here the two towers are joined.
    **linear("mlp.2", "residual hidden.merger"),
}


def joined(image_mlp: Spec) -> Spec:
    """Give the lines of both towers, from those of the images' MLP."""
    blocks = {**BLOCK, **under("mlp.", image_mlp)}
    return {
        "model.visual.patch_embed.proj.weight": "residual.vision _ _ _ _",
        **under("model.visual.blocks.{i}.", of_tower("vision", blocks)),
        **under("model.visual.merger.", MERGER),
        **under("model.language_model.", decoder()),
        "lm_head.weight": "_ residual",
    }


QWEN_VL_CLASSES: dict[str, Spec] = {
    "Qwen2VLForConditionalGeneration": joined(mlp("fc1", "fc2")),
    "Qwen2_5_VLForConditionalGeneration": joined(GATED_MLP),
}
