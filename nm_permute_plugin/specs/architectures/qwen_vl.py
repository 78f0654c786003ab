# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL and Qwen2.5-VL: a tower of images that writes into a language model."""

from nm_permute_plugin.specs.architectures.building import under
from nm_permute_plugin.specs.architectures.llama import decoder
from nm_permute_plugin.specs.spec import Spec

TOWER: Spec = {
    "patch_embed.proj.weight": "residual.vision _ _ _ _",
    "blocks.{i}.{norm1,norm2}.{weight,bias}?": "residual.vision",
    "blocks.{i}.attn.qkv.weight": "_:heads+_+value.vision.{i} residual.vision",
    "blocks.{i}.attn.qkv.bias": "_:heads+_+value.vision.{i}",
    "blocks.{i}.attn.proj.weight": "residual.vision value.vision.{i}:heads",
    "blocks.{i}.attn.proj.bias": "residual.vision",
    # The merger reads four neighbouring patches as one vector, patch after patch.
    "merger.ln_q.{weight,bias}?": "residual.vision",
    "merger.mlp.0.weight": "hidden.merger " + "+".join(["residual.vision"] * 4),
    "merger.mlp.0.bias": "hidden.merger",
    # Its output stands among the text's embeddings: here the two towers are joined.
    "merger.mlp.2.weight": "residual hidden.merger",
    "merger.mlp.2.bias": "residual",
}
MLP: Spec = {
    "blocks.{i}.mlp.fc1.weight": "hidden.vision.{i} residual.vision",
    "blocks.{i}.mlp.fc1.bias": "hidden.vision.{i}",
    "blocks.{i}.mlp.fc2.weight": "residual.vision hidden.vision.{i}",
    "blocks.{i}.mlp.fc2.bias": "residual.vision",
}
GATED_MLP: Spec = {
    "blocks.{i}.mlp.{gate,up}_proj.weight": "hidden.vision.{i} residual.vision",
    "blocks.{i}.mlp.{gate,up}_proj.bias?": "hidden.vision.{i}",
    "blocks.{i}.mlp.down_proj.weight": "residual.vision hidden.vision.{i}",
    "blocks.{i}.mlp.down_proj.bias?": "residual.vision",
}


def joined(mlp: Spec) -> Spec:
    """Both towers, from the lines of the images' MLP."""
    return {
        **under("model.visual.", {**TOWER, **mlp}),
        **under("model.language_model.", decoder()),
        "lm_head.weight": "_ residual",
    }


QWEN_VL_CLASSES: dict[str, Spec] = {
    "Qwen2VLForConditionalGeneration": joined(MLP),
    "Qwen2_5_VLForConditionalGeneration": joined(GATED_MLP),
}
