# SPDX-License-Identifier: Apache-2.0
"""
What vLLM says in several of its modes at once: run by the interpreter that has vLLM.

Usage, one engine after the other in one process::

    python modes.py OUT.json ADAPTER DENSE SPARSE CACHED_DENSE CACHED_SPARSE EXPERTS
"""

import json
import sys
from types import SimpleNamespace

import generate

LONG = "The quick brown fox jumps over the lazy dog, and " * 6
PROMPTS = [LONG + "then it", LONG + "but the dog"]
# prompts are longer than what a step takes, and begin alike
SHARED = {
    "enable_lora": True,
    "max_lora_rank": 8,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 8,
}
HALF = {"dtype": "half", "cpu_offload_gb": 1}
GUESSED = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
"""Speculative decoding, which must say what is said without it."""


def said(directory, adapter=None, draft=None, **options):
    """Greedy tokens and logprobs; with LoRA without an adapter, with it, and again."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    if draft is not None:
        how = {"method": "draft_model", "model": draft, "num_speculative_tokens": 3}
        options |= {"speculative_config": how, "disable_log_stats": False}
    llm = LLM(directory, max_model_len=128, enforce_eager=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    rounds = [None]
    if adapter is not None:
        rounds = [None, LoRARequest("adapter", 1, adapter), None]
    found = []
    for lora in rounds:
        for prompt in PROMPTS:
            answer = llm.generate(prompt, sampling, use_tqdm=False, lora_request=lora)
            output = answer[0].outputs[0]
            best = [next(iter(step.values())).logprob for step in output.logprobs]
            found.append([list(output.token_ids), best])
    if draft is not None:
        found.append(guesses(llm))
    del llm
    cleanup_dist_env_and_memory()
    return found


def guesses(llm):
    """How many tokens the draft model guessed, and how many of them were right."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    kinds = ("draft", "accepted")
    return [metrics[f"vllm:spec_decode_num_{kind}_tokens"].value for kind in kinds]


def crashed(directory):
    """What is said where the kernel of experts crashed when it was tried: a stand-in."""
    from stand_in import pack_experts

    from nm_permute_plugin.serving import (
        expert_loading,
        expert_table,
        experts,
        kernel_table,
    )

    card = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: True)
    experts.current_platform = card
    experts.unsupported = lambda shape, like: None
    expert_loading.pack_experts = pack_experts
    kernel_table.path_of = lambda weight, kernels: kernel_table.Path("no/table.json")
    expert_table.crash_of = lambda *words: "an illegal memory access"
    return generate.generate(directory, generate.PROMPTS)


def main(words):
    out, adapter, dense, sparse, *cached, experts = words
    found = {
        "shared": [said(path, adapter, **SHARED) for path in (dense, sparse)],
        "cached": [
            said(path, draft=draft, kv_cache_dtype="fp8")
            for path, draft in zip(cached, (dense, sparse), strict=True)
        ],
        "wide": said(cached[0], kv_cache_dtype="bfloat16"),
        "crashed": crashed(experts),
        # in this order: after guesses vLLM starts no other engine in the same process
        "half": [
            said(dense, **HALF),
            said(sparse, **HALF, speculative_config=GUESSED),
        ],
    }
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1:])
