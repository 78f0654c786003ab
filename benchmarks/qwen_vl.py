# SPDX-License-Identifier: Apache-2.0
"""
A Qwen2.5-VL whose language tower has the weights of a real Llama model.

    python benchmarks/qwen_vl.py LLAMA OUT

Qwen2's decoder is Llama's with biases on queries, keys and values, which are 0 here; with
text alone its rotary embeddings are Llama's too. The tower of images is small and random.
Prints how far the logits of text are from Llama's; OUT is an ordinary folder then:

    nm-permute prune OUT recipes/2of4_learned_qwen25vl.yaml OUT-2of4 --text TEXT
    nm-permute evaluate OUT-2of4 --text TEST --dense OUT
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)
"""What both configs call alike."""

VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "fullatt_block_indexes": [3],
}


def joined(llama: LlamaForCausalLM) -> Qwen2_5_VLForConditionalGeneration:
    """
    A model with both, in the dtype of ``llama``.

    :raises RuntimeError: if a weight of either has no place in the other
    """
    config = llama.config
    head = config.hidden_size // config.num_attention_heads
    sections = [head // 8, head * 3 // 16, head * 3 // 16]  # of rotary pairs
    text = {name: getattr(config, name) for name in SAME} | {
        "rope_parameters": {**config.rope_parameters, "mrope_section": sections}
    }
    vision = VISION | {"out_hidden_size": config.hidden_size}
    whole = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(whole).to(llama.dtype).eval()
    tower = model.model.language_model
    weights = llama.model.state_dict()
    biases = {
        name: torch.zeros_like(value)
        for name, value in tower.state_dict().items()
        if name.endswith((".q_proj.bias", ".k_proj.bias", ".v_proj.bias"))
    }
    tower.load_state_dict(weights | biases)
    model.lm_head.load_state_dict(llama.lm_head.state_dict())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("llama", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    llama = LlamaForCausalLM.from_pretrained(args.llama, dtype=torch.float32).eval()
    model = joined(llama)
    tokenizer = AutoTokenizer.from_pretrained(args.llama)
    ids = tokenizer("The capital of France is Paris.", return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits.double() for m in (model, llama))
    print(
        f"float32 logits differ by {float((ours - theirs).norm() / theirs.norm()):.1e}"
    )
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
