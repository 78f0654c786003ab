# SPDX-License-Identifier: Apache-2.0
"""
The embeddings that vLLM makes of two texts: run by the interpreter that has vLLM.

Usage, one engine after the other in one process::

    python embed.py OUT.json DIR...
"""

import json
import sys


def embed(directory):
    """A vector a text, and the class that read the checkpoint's config."""
    from generate import PROMPTS
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(directory, runner="pooling", max_model_len=128, enforce_eager=True)
    # one by one: how rows are batched would show in the last bits
    vectors = [llm.embed(p, use_tqdm=False)[0].outputs.embedding for p in PROMPTS]
    config = llm.llm_engine.vllm_config
    said = {"config": type(config.quant_config).__name__, "vectors": vectors}
    del llm
    cleanup_dist_env_and_memory()
    return said


def main(words):
    out, *directories = words
    said = {directory: embed(directory) for directory in directories}
    with open(out, "w") as file:
        json.dump(said, file)


if __name__ == "__main__":
    main(sys.argv[1:])
