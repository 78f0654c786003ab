# SPDX-License-Identifier: Apache-2.0
"""
What vLLM says to two prompts: run by the interpreter that has vLLM.

Usage, one engine after the other in one process::

    python generate.py OUT.json DIR...

OPTIONS, as JSON, are those of the engine.
"""

import json
import os
import sys

from portable import multiply_fp8_fast

PROMPTS = ["The capital of France is", "def fibonacci(n):\n    "]


def generate(directory, prompts, **options):
    """Greedy tokens with their logprobs, and which classes of vLLM made them."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        directory,
        max_model_len=128,
        enforce_eager=True,
        num_gpu_blocks_override=64,  # all of the cache is filled with zeros
        **options,
    )
    sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=3)
    # one by one: how rows are batched would show in the last bits
    answers = [llm.generate(p, sampling, use_tqdm=False)[0] for p in prompts]
    config = llm.llm_engine.vllm_config
    said = {
        "config": type(config.quant_config).__name__,
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "logprobs": [
            [sorted((i, p.logprob) for i, p in step.items()) for step in logprobs]
            for logprobs in (answer.outputs[0].logprobs for answer in answers)
        ],
    }
    del llm
    cleanup_dist_env_and_memory()
    return said


def main(words):
    multiply_fp8_fast()
    out, *directories = words
    options = json.loads(os.environ.get("OPTIONS", "{}"))
    said = {
        directory: generate(directory, PROMPTS, **options) for directory in directories
    }
    with open(out, "w") as file:
        json.dump(said, file)


if __name__ == "__main__":
    main(sys.argv[1:])
