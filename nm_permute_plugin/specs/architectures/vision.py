# SPDX-License-Identifier: Apache-2.0
"""Encoders of images: ViT, DeiT, DINOv2, and the towers of CLIP and SigLIP."""

from nm_permute_plugin.specs.architectures.building import (
    output_fixed,
    renamed,
    under,
)
from nm_permute_plugin.specs.spec import Spec

EMBEDDINGS: Spec = {
    "embeddings.{cls_token,position_embeddings}": "_ _ residual",
    "embeddings.patch_embeddings.projection.weight": "residual _ _ _",
    "embeddings.patch_embeddings.projection.bias?": "residual",
}
LABELS: Spec = {"classifier.weight?": "_ residual", "classifier.bias?": "_"}

VIT: Spec = {
    **EMBEDDINGS,
    "embeddings.{mask_token,distillation_token}?": "_ _ residual",
    "layers.{i}.layernorm_{before,after}.{weight,bias}": "residual",
    "layers.{i}.attention.{q,k}_proj.weight": "_ residual",
    "layers.{i}.attention.{q,k}_proj.bias?": "_",
    "layers.{i}.attention.v_proj.weight": "value.{i} residual",
    "layers.{i}.attention.v_proj.bias?": "value.{i}",
    "layers.{i}.attention.o_proj.weight": "residual value.{i}:heads",
    "layers.{i}.attention.o_proj.bias?": "residual",
    "layers.{i}.mlp.fc1.weight": "hidden.{i} residual",
    "layers.{i}.mlp.fc1.bias": "hidden.{i}",
    "layers.{i}.mlp.fc2.weight": "residual hidden.{i}",
    "layers.{i}.mlp.fc2.bias": "residual",
    "layernorm.{weight,bias}": "residual",
}
POOLER: Spec = {"pooler.dense.weight?": "_ residual", "pooler.dense.bias?": "_"}

DINOV2: Spec = {
    **EMBEDDINGS,
    "embeddings.mask_token?": "_ residual",
    "encoder.layer.{i}.{norm1,norm2}.{weight,bias}": "residual",
    "encoder.layer.{i}.attention.attention.{query,key}.weight": "_ residual",
    "encoder.layer.{i}.attention.attention.{query,key}.bias?": "_",
    "encoder.layer.{i}.attention.attention.value.weight": "value.{i} residual",
    "encoder.layer.{i}.attention.attention.value.bias?": "value.{i}",
    "encoder.layer.{i}.attention.output.dense.weight": "residual value.{i}:heads",
    "encoder.layer.{i}.attention.output.dense.bias": "residual",
    "encoder.layer.{i}.{layer_scale1,layer_scale2}.lambda1": "residual",
    "encoder.layer.{i}.mlp.fc1.weight?": "hidden.{i} residual",
    "encoder.layer.{i}.mlp.fc1.bias?": "hidden.{i}",
    "encoder.layer.{i}.mlp.fc2.weight?": "residual hidden.{i}",
    "encoder.layer.{i}.mlp.fc2.bias?": "residual",
    # The giant model's gate and value in one.
    "encoder.layer.{i}.mlp.weights_in.weight?": "hidden.{i}+hidden.{i} residual",
    "encoder.layer.{i}.mlp.weights_in.bias?": "hidden.{i}+hidden.{i}",
    "encoder.layer.{i}.mlp.weights_out.weight?": "residual hidden.{i}",
    "encoder.layer.{i}.mlp.weights_out.bias?": "residual",
    "layernorm.{weight,bias}": "residual",
}

# One layer of both towers of CLIP and of SigLIP.
LAYERS: Spec = {
    "encoder.layers.{i}.{layer_norm1,layer_norm2}.{weight,bias}": "residual",
    "encoder.layers.{i}.self_attn.{q,k}_proj.weight": "_ residual",
    "encoder.layers.{i}.self_attn.{q,k}_proj.bias": "_",
    "encoder.layers.{i}.self_attn.v_proj.weight": "value.{i} residual",
    "encoder.layers.{i}.self_attn.v_proj.bias": "value.{i}",
    "encoder.layers.{i}.self_attn.out_proj.weight": "residual value.{i}:heads",
    "encoder.layers.{i}.self_attn.out_proj.bias": "residual",
    "encoder.layers.{i}.mlp.fc1.weight": "hidden.{i} residual",
    "encoder.layers.{i}.mlp.fc1.bias": "hidden.{i}",
    "encoder.layers.{i}.mlp.fc2.weight": "residual hidden.{i}",
    "encoder.layers.{i}.mlp.fc2.bias": "residual",
}
PATCHES: Spec = {
    **LAYERS,
    "embeddings.patch_embedding.weight": "residual _ _ _",
    "embeddings.patch_embedding.bias?": "residual",
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
    "head.probe?": "_ _ residual",
    "head.attention.in_proj_weight?": "_:heads+_+value.pool residual",
    "head.attention.in_proj_bias?": "_:heads+_+value.pool",
    "head.attention.out_proj.weight?": "_output value.pool:heads",
    "head.attention.out_proj.bias?": "_output",
    "head.layernorm.{weight,bias}?": "_output",
    "head.mlp.fc1.weight?": "hidden.pool _output",
    "head.mlp.fc1.bias?": "hidden.pool",
    "head.mlp.fc2.weight?": "_output hidden.pool",
    "head.mlp.fc2.bias?": "_output",
}
SIGLIP_VISION: Spec = {**PATCHES, **SIGLIP_HEAD}


def tower(name: str, spec: Spec) -> Spec:
    """The lines of a tower of a larger model, with spaces of its own."""
    for family in ("residual", "hidden", "value"):
        spec = renamed(spec, family, f"{family}.{name}")
    return under(f"{name}_model.", spec)


VISION_CLASSES: dict[str, Spec] = {
    "ViTModel": output_fixed({**VIT, **POOLER}),
    "ViTForImageClassification": {**under("vit.", VIT), **LABELS},
    "DeiTModel": output_fixed({**VIT, **POOLER}),
    "DeiTForImageClassification": {**under("deit.", VIT), **LABELS},
    "DeiTForImageClassificationWithTeacher": {
        **under("deit.", VIT),
        "{cls,distillation}_classifier.weight?": "_ residual",
        "{cls,distillation}_classifier.bias?": "_",
    },
    "Dinov2Model": output_fixed(DINOV2),
    "Dinov2ForImageClassification": {
        **under("dinov2.", DINOV2),
        # It reads the class token and the mean of the patches, one after the other.
        "classifier.weight?": "_ residual+residual",
        "classifier.bias?": "_",
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
        "text_model.head.weight": "_ residual.text",
        "text_model.head.bias": "_",
        **tower("vision", SIGLIP_VISION),
    },
}
