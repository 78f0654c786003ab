# SPDX-License-Identifier: Apache-2.0
"""
What vLLM says in several of its modes at once: run by the interpreter that has vLLM.

Usage, one engine after the other in one process::

    python modes.py OUT.json ADAPTER DENSE SPARSE
"""

import json
import sys

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


def said(directory, adapter, **options):
    """Greedy tokens and logprobs; with LoRA without an adapter, with it, and again."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    llm = LLM(directory, max_model_len=128, enforce_eager=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    rounds = [None]
    if "enable_lora" in options:
        rounds = [None, LoRARequest("adapter", 1, adapter), None]
    found = []
    for lora in rounds:
        for prompt in PROMPTS:
            answer = llm.generate(prompt, sampling, use_tqdm=False, lora_request=lora)
            output = answer[0].outputs[0]
            best = [next(iter(step.values())).logprob for step in output.logprobs]
            found.append([list(output.token_ids), best])
    del llm
    cleanup_dist_env_and_memory()
    return found


def main(words):
    out, adapter, dense, sparse = words
    found = {
        "shared": [said(path, adapter, **SHARED) for path in (dense, sparse)],
        # in this order: after guesses vLLM starts no other engine in the same process
        "half": [
            said(dense, adapter, **HALF),
            said(sparse, adapter, **HALF, speculative_config=GUESSED),
        ],
    }
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1:])
