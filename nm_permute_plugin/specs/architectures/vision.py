# SPDX-License-Identifier: Apache-2.0
"""Encoders of images: ViT, DeiT, DINOv2, and the towers of CLIP and SigLIP."""

from nm_permute_plugin.specs.architectures.building import (
    attention,
    linear,
    mlp,
    of_tower,
    output_fixed,
    under,
)
from nm_permute_plugin.specs.spec import Spec

EMBEDDINGS: Spec = {
    "embeddings.{cls_token,position_embeddings}": "_ _ residual",
    **linear("embeddings.patch_embeddings.projection", "residual _ _ _", bias="?"),
}
LABELS: Spec = linear("classifier?", "_ residual")

VIT_ATTENTION: Spec = attention("{q,k}_proj", "v_proj", "o_proj", bias="?")
VIT: Spec = {
    **EMBEDDINGS,
    "embeddings.{mask_token,distillation_token}?": "_ _ residual",
    "layers.{i}.layernorm_{before,after}.{weight,bias}": "residual",
    **under("layers.{i}.attention.", VIT_ATTENTION),
    **under("layers.{i}.mlp.", mlp("fc1", "fc2")),
    "layernorm.{weight,bias}": "residual",
}
VIT_WITHOUT_HEAD: Spec = output_fixed({**VIT, **linear("pooler.dense?", "_ residual")})

DINOV2_LAYER: Spec = {
    "{norm1,norm2}.{weight,bias}": "residual",
    **linear("attention.attention.{query,key}", "_ residual", bias="?"),
    **linear("attention.attention.value", "value.{i} residual", bias="?"),
    **linear("attention.output.dense", "residual value.{i}:heads"),
    "{layer_scale1,layer_scale2}.lambda1": "residual",
    **under("mlp.", mlp("fc1?", "fc2?")),
    # The giant model's gate and value in one.
    **linear("mlp.weights_in?", "hidden.{i}+hidden.{i} residual"),
    **linear("mlp.weights_out?", "residual hidden.{i}"),
}
DINOV2: Spec = {
    **EMBEDDINGS,
    "embeddings.mask_token?": "_ residual",
    **under("encoder.layer.{i}.", DINOV2_LAYER),
    "layernorm.{weight,bias}": "residual",
}

# One layer of both towers of CLIP and of SigLIP.
CLIP_ATTENTION: Spec = attention("{q,k}_proj", "v_proj", "out_proj")
LAYERS: Spec = {
    "encoder.layers.{i}.{layer_norm1,layer_norm2}.{weight,bias}": "residual",
    **under("encoder.layers.{i}.self_attn.", CLIP_ATTENTION),
    **under("encoder.layers.{i}.mlp.", mlp("fc1", "fc2")),
}
PATCHES: Spec = {
    **LAYERS,
    **linear("embeddings.patch_embedding", "residual _ _ _", bias="?"),
    "embeddings.position_embedding.weight": "_ residual",
    "post_layernorm.{weight,bias}": "residual",
}
CLIP_VISION: Spec = {
    **PATCHES,
    "embeddings.class_embedding": "residual",
    "pre_layrnorm.{weight,bias}": "residual",
}
TEXT: Spec = {
    **LAYERS,
    "embeddings.{token,position}_embedding.weight": "_ residual",
    "final_layer_norm.{weight,bias}": "residual",
}
# Attention of one query over all patches; what it writes is the model's output.
SIGLIP_HEAD: Spec = {
    "probe?": "_ _ residual",
    "attention.in_proj_weight?": "_:heads+_+value.pool residual",
    "attention.in_proj_bias?": "_:heads+_+value.pool",
    **linear("attention.out_proj?", "_output value.pool:heads"),
    "layernorm.{weight,bias}?": "_output",
    **linear("mlp.fc1?", "hidden.pool _output"),
    **linear("mlp.fc2?", "_output hidden.pool"),
}
SIGLIP_VISION: Spec = {**PATCHES, **under("head.", SIGLIP_HEAD)}


def tower(name: str, spec: Spec) -> Spec:
    """Give the lines of a tower of a larger model, with spaces of its own."""
    return under(f"{name}_model.", of_tower(name, spec))


VISION_CLASSES: dict[str, Spec] = {
    "ViTModel": VIT_WITHOUT_HEAD,
    "ViTForImageClassification": {**under("vit.", VIT), **LABELS},
    "DeiTModel": VIT_WITHOUT_HEAD,
    "DeiTForImageClassification": {**under("deit.", VIT), **LABELS},
    "DeiTForImageClassificationWithTeacher": {
        **under("deit.", VIT),
        **linear("{cls,distillation}_classifier?", "_ residual"),
    },
    "Dinov2Model": output_fixed(DINOV2),
    "Dinov2ForImageClassification": {
        **under("dinov2.", DINOV2),
        # It reads the class token and the mean of the patches, one after the other.
        **linear("classifier?", "_ residual+residual"),
    },
    "CLIPVisionModel": output_fixed(CLIP_VISION),
    "CLIPModel": {
        "logit_scale": "",
        **tower("text", TEXT),
        **tower("vision", CLIP_VISION),
        "text_projection.weight": "_ residual.text",
        "visual_projection.weight": "_ residual.vision",
    },
    "SiglipVisionModel": output_fixed(SIGLIP_VISION),
    "SiglipModel": {
        "{logit_scale,logit_bias}": "_",
        **tower("text", TEXT),
        **under("text_model.", linear("head", "_ residual.text")),
        **tower("vision", SIGLIP_VISION),
    },
}
