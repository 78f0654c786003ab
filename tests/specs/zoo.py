# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of every class that has a spec, in every shape that matters."""

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from nm_permute_plugin.specs.exactness import to_float64

TEXT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MHA = {"num_key_value_heads": 4}
MQA = {"num_key_value_heads": 1}
TIED = {"tie_word_embeddings": True}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.5}
NINE = {
    "hidden_size": 36,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 24}
GPT2 = {
    "vocab_size": 48,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
NEOX = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# One key and value for all queries, one norm, no biases: the form of Falcon-7B.
FALCON = {**NEOX, "ffn_hidden_size": 48, "bias": False}
# Two queries a key/value head, two norms: the form of Falcon-40B.
FALCON_NEW = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
# A key and value for each query, positions by alibi: the form of Falcon-RW-1B.
FALCON_OLD = {
    **FALCON,
    "multi_query": False,
    "parallel_attn": False,
    "alibi": True,
    "bias": True,
}
BERT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
THREE = {"hidden_size": 36, "num_attention_heads": 3}
CLIP_TEXT = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
    "projection_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {"text_config": CLIP_TEXT, "vision_config": VISION, "projection_dim": 16}
SIGLIP = {"text_config": {**CLIP_TEXT, "projection_size": 32}, "vision_config": VISION}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
JOINED = {
    "text_config": {**TEXT, "rope_parameters": ROPE},
    "image_token_id": 40,
    "video_token_id": 41,
    "vision_start_token_id": 42,
    "vision_end_token_id": 43,
    "tie_word_embeddings": False,
}
TOWER = {
    "depth": 2,
    "hidden_size": 24,
    "num_heads": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN2_VL = {
    **JOINED,
    "vision_config": {**TOWER, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2},
}
QWEN2_5_VL = {
    **JOINED,
    "vision_config": {
        **TOWER,
        "out_hidden_size": 32,
        "intermediate_size": 40,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
}


def _case(id: str, name: str, config: str, options: dict) -> object:
    return pytest.param(name, config, options, id=id)


def _decoder(name: str, config: str, extra: dict, *others: tuple[str, dict]) -> list:
    """A decoder in every shape, and its other classes."""
    short = name.removesuffix("ForCausalLM").lower()
    shapes = {"gqa": {}, "mha-tied": {**MHA, **TIED}, "mqa": MQA, "nine-heads": NINE}
    return [
        _case(f"{short}-{shape}", name, config, {**TEXT, **extra, **options})
        for shape, options in shapes.items()
    ] + [
        _case(other.lower(), other, config, {**TEXT, **extra, **more})
        for other, more in others
    ]


ZOO = [
    *_decoder(
        "LlamaForCausalLM",
        "LlamaConfig",
        {},
        ("LlamaForSequenceClassification", {"attention_bias": True, "mlp_bias": True}),
        ("LlamaModel", {}),
    ),
    *_decoder("MistralForCausalLM", "MistralConfig", {}, ("MistralModel", {})),
    *_decoder("Qwen2ForCausalLM", "Qwen2Config", {}, ("Qwen2Model", {})),
    *_decoder("Qwen3ForCausalLM", "Qwen3Config", {}, ("Qwen3Model", {})),
    *_decoder(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"query_pre_attn_scalar": 8, "sliding_window": 8},
        ("Gemma2ForSequenceClassification", {"attention_bias": True}),
        ("Gemma2Model", {}),
    ),
    *_decoder(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        ("Gemma3TextModel", {"attention_bias": True}),
    ),
    *_decoder(
        "Phi3ForCausalLM",
        "Phi3Config",
        {},
        ("Phi3ForSequenceClassification", {}),
        ("Phi3Model", {}),
    ),
    *_decoder("Qwen2MoeForCausalLM", "Qwen2MoeConfig", SHARED, ("Qwen2MoeModel", {})),
    _case(
        "qwen2moe-one-dense-layer",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**TEXT, **SHARED, "mlp_only_layers": [1], "qkv_bias": False},
    ),
    *_decoder("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS, ("Qwen3MoeModel", {})),
    _case(
        "qwen3moe-one-dense-layer",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**TEXT, **EXPERTS, "mlp_only_layers": [0], "attention_bias": True},
    ),
    *_decoder(
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_local_experts": 4},
        ("MixtralModel", {}),
    ),
    *_decoder(
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        {"no_rope_layers": [1, 0]},
        (
            "SmolLM3ForSequenceClassification",
            {"attention_bias": True, "mlp_bias": True},
        ),
        ("SmolLM3Model", {}),
    ),
    *_decoder(
        "Olmo2ForCausalLM",
        "Olmo2Config",
        {},
        ("Olmo2ForSequenceClassification", {"attention_bias": True}),
        ("Olmo2Model", {}),
    ),
    *_decoder(
        "GraniteForCausalLM",
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.125,
            "logits_scaling": 8.0,
        },
        ("GraniteModel", {"attention_bias": True, "mlp_bias": True}),
    ),
    *_decoder(
        "CohereForCausalLM",
        "CohereConfig",
        {"logit_scale": 0.25},
        ("CohereForCausalLM", {"use_qk_norm": True, **TIED}),
        ("CohereModel", {"attention_bias": True}),
    ),
    *_decoder(
        "Cohere2ForCausalLM",
        "Cohere2Config",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        ("Cohere2Model", {"attention_bias": True}),
    ),
    *_decoder(
        "StableLmForCausalLM",
        "StableLmConfig",
        {},
        (
            "StableLmForSequenceClassification",
            {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
        ),
        ("StableLmModel", {"rope_parameters": {**PARTIAL, "rope_theta": 1e4}}),
    ),
    *_decoder(
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        {"sliding_window": 8},
        ("Starcoder2ForSequenceClassification", {"use_bias": False}),
        ("Starcoder2Model", {}),
    ),
    _case("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),
    _case(
        "gpt-neox-three-heads-tied",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {
            **NEOX,
            **TIED,
            "hidden_size": 36,
            "num_attention_heads": 3,
            "use_parallel_residual": False,
            "attention_bias": False,
        },
    ),
    _case("gpt-neox-labels", "GPTNeoXForSequenceClassification", "GPTNeoXConfig", NEOX),
    _case("gpt-neox-bare", "GPTNeoXModel", "GPTNeoXConfig", NEOX),
    _case("falcon-one-value", "FalconForCausalLM", "FalconConfig", FALCON),
    _case("falcon-grouped", "FalconForCausalLM", "FalconConfig", FALCON_NEW),
    _case(
        "falcon-grouped-one-norm",
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON_NEW, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    ),
    _case("falcon-alibi", "FalconForCausalLM", "FalconConfig", FALCON_OLD),
    _case("falcon-labels", "FalconForSequenceClassification", "FalconConfig", FALCON),
    _case("falcon-bare", "FalconModel", "FalconConfig", FALCON_NEW),
    _case("gpt2-tied", "GPT2LMHeadModel", "GPT2Config", GPT2),
    _case(
        "gpt2-three-heads",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **GPT2,
            "n_embd": 24,
            "n_head": 3,
            "n_inner": 40,
            "tie_word_embeddings": False,
        },
    ),
    _case("gpt2-labels", "GPT2ForSequenceClassification", "GPT2Config", GPT2),
    _case("gpt2-bare", "GPT2Model", "GPT2Config", GPT2),
    _case("opt-tied", "OPTForCausalLM", "OPTConfig", OPT),
    _case(
        "opt-no-biases",
        "OPTForCausalLM",
        "OPTConfig",
        {
            **OPT,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "tie_word_embeddings": False,
        },
    ),
    _case(
        "opt-350m",
        "OPTForCausalLM",
        "OPTConfig",
        {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    _case(
        "opt-350m-untied",
        "OPTForCausalLM",
        "OPTConfig",
        {
            **OPT,
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 16,
            "tie_word_embeddings": False,
        },
    ),
    *[
        _case(f"{family}{kind}".lower(), family + kind, f"{family}Config", BERT)
        for family in ("Bert", "Roberta")
        for kind in ("Model", "ForSequenceClassification", "ForTokenClassification")
    ],
    _case("bert-three-heads", "BertModel", "BertConfig", {**BERT, **THREE}),
    _case("vit-bare", "ViTModel", "ViTConfig", VISION),
    _case("vit-labels", "ViTForImageClassification", "ViTConfig", VISION),
    _case(
        "vit-three-heads-no-qkv-bias",
        "ViTForImageClassification",
        "ViTConfig",
        {**VISION, **THREE, "qkv_bias": False},
    ),
    _case("deit-bare", "DeiTModel", "DeiTConfig", VISION),
    _case("deit-labels", "DeiTForImageClassification", "DeiTConfig", VISION),
    _case(
        "deit-teacher", "DeiTForImageClassificationWithTeacher", "DeiTConfig", VISION
    ),
    _case("dinov2-bare", "Dinov2Model", "Dinov2Config", VISION),
    _case("dinov2-labels", "Dinov2ForImageClassification", "Dinov2Config", VISION),
    _case(
        "dinov2-swiglu-three-heads",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**VISION, **THREE, "use_swiglu_ffn": True},
    ),
    _case("clip-vision", "CLIPVisionModel", "CLIPVisionConfig", VISION),
    _case("clip", "CLIPModel", "CLIPConfig", CLIP),
    _case("siglip-vision", "SiglipVisionModel", "SiglipVisionConfig", VISION),
    _case(
        "siglip-vision-no-head",
        "SiglipVisionModel",
        "SiglipVisionConfig",
        {**VISION, "vision_use_head": False},
    ),
    _case("siglip", "SiglipModel", "SiglipConfig", SIGLIP),
    _case("qwen2-vl", "Qwen2VLForConditionalGeneration", "Qwen2VLConfig", QWEN2_VL),
    _case(
        "qwen2-vl-tied",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {**QWEN2_VL, "tie_word_embeddings": True},
    ),
    _case(
        "qwen2.5-vl",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        QWEN2_5_VL,
    ),
]


def tiny(name: str, config: str, options: dict, dtype: torch.dtype) -> PreTrainedModel:
    """The model, every parameter random: one that is constant hides a bad fold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config)(**options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return to_float64(model) if dtype == torch.float64 else model.to(dtype).eval()


def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """
    The logits, whatever file the weights came from.

    Loaded weights lie where they lay in the file, and the last bits of a product differ
    with the place: here each has memory of its own first.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model(tokens).logits
