# SPDX-License-Identifier: Apache-2.0
"""
Does vLLM say the same with a pruned model of each family as with its dense form?

    python benchmarks/families.py make FOLDER     # where llm-compressor is
    python benchmarks/families.py serve FOLDER    # where vLLM is

Tiny random models in bfloat16, pruned 2:4 by the search, stored as ``format: auto`` says;
greedy tokens and logprobs of two prompts. The tokenizer is that of ``nm-permute demo``.
"""

import argparse
import sys
from pathlib import Path

import torch

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**TEXT, "sliding_window": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 64}
OPT = {
    "hidden_size": 128,
    "ffn_dim": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "word_embed_proj_dim": 128,
}
POST_NORM = {"do_layer_norm_before": False, "word_embed_proj_dim": 64}
GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
NEOX = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# vLLM's Falcon knows no other inner width than four times the outer.
FALCON = {**NEOX, "ffn_hidden_size": 512, "bias": False}
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
ALIBI = {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}
SLIDING = {
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}
GRANITE |= {"attention_multiplier": 0.03125, "logits_scaling": 8.0}
TIED = {"tie_word_embeddings": True, "query_pre_attn_scalar": 32}
FAMILIES = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "Mistral": ("MistralForCausalLM", "MistralConfig", TEXT),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TEXT),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GEMMA, **TIED}),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT),
    "SmolLM3": ("SmolLM3ForCausalLM", "SmolLM3Config", TEXT),
    "OLMo2": ("Olmo2ForCausalLM", "Olmo2Config", TEXT),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", {**TEXT, **GRANITE}),
    "Cohere": (
        "CohereForCausalLM",
        "CohereConfig",
        {**TEXT, "use_qk_norm": True, "tie_word_embeddings": True},
    ),
    "Cohere2": (
        "Cohere2ForCausalLM",
        "Cohere2Config",
        {**TEXT, **SLIDING, "tie_word_embeddings": True},
    ),
    "StableLM": ("StableLmForCausalLM", "StableLmConfig", TEXT),
    "Starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", TEXT),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),
    "Falcon, the 7B form": ("FalconForCausalLM", "FalconConfig", FALCON),
    "Falcon, the 40B form": (
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, **GROUPED},
    ),
    "Falcon, with alibi": ("FalconForCausalLM", "FalconConfig", {**FALCON, **ALIBI}),
    "OPT": ("OPTForCausalLM", "OPTConfig", OPT),
    "OPT, the 350M form": ("OPTForCausalLM", "OPTConfig", {**OPT, **POST_NORM}),
    "GPT2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**TEXT, **SHARED}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**TEXT, **EXPERTS}),
    "Mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**TEXT, "num_local_experts": 4},
    ),
}
RECIPE = """prune_stage:
  permutation_modifiers:
    LearnablePermutationModifier:
      method: search
      search: {{rounds: 1}}
      ignore: [{ignore}]
"""


def make(folder: Path, only: str) -> None:
    """Prune a random model of each family, and convert it; what is there stays."""
    import transformers

    from nm_permute_plugin.checkpoint.writer import convert
    from nm_permute_plugin.cli.embedded import write_embedded_model
    from nm_permute_plugin.cli.prune import prune_checkpoint

    whole = write_embedded_model(folder / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 40000, (12, 32), generator=generator).tolist()
    for family, (kind, config, options) in FAMILIES.items():
        if only not in family or (folder / family / "dense").exists():
            continue
        torch.manual_seed(0)
        sizes = getattr(transformers, config)(vocab_size=len(tokenizer), **options)
        model = getattr(transformers, kind)(sizes)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.uniform_(0.5, 1.5)
            else:
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
        source = folder / family / "source"
        model.to(torch.bfloat16).save_pretrained(source)
        tokenizer.save_pretrained(source)
        shared = ', "re:.*shared_expert_gate"' if family == "Qwen2-MoE" else ""
        recipe = folder / family / "recipe.yaml"
        recipe.write_text(RECIPE.format(ignore=f'"lm_head"{shared}'))
        pruned = folder / family / "pruned"
        prune_checkpoint(source, recipe, pruned, rows, "cpu")
        convert(pruned, folder / family / "dense", "dense")


def serve(folder: Path, only: str) -> None:
    """Compare what the engine says to both, and print a row a family."""
    scripts = Path(__file__).parents[1] / "tests" / "serving" / "engine" / "scripts"
    sys.path.insert(0, str(scripts))
    from generate import PROMPTS, generate

    print("| family | claimed by | tokens equal | logprobs equal |\n|---|---|---|---|")
    for family in FAMILIES:
        if only not in family:
            continue
        pruned, dense = (
            generate(str(folder / family / form), PROMPTS)
            for form in ("pruned", "dense")
        )
        same = [pruned[key] == dense[key] for key in ("tokens", "logprobs")]
        cells = [family, pruned["config"], *("yes" if x else "NO" for x in same)]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "serve"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="part of a family's name")
    args = parser.parse_args()
    {"make": make, "serve": serve}[args.what](args.folder, args.only)


if __name__ == "__main__":
    main()
