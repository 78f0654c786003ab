# SPDX-License-Identifier: Apache-2.0
"""
What vLLM says after ``--load-format dummy``, and after real weights are loaded: run by the
interpreter that has vLLM.

Usage, one engine after the other in one process; with STAND_IN=1 the layers take the way
of a GPU::

    python reload.py OUT.json (DIR OTHER)...

OTHER is loaded in the place of DIR, and DIR once more.
"""

import json
import os
import sys

from portable import multiply_fp8_fast

PROMPT = "The capital of France is"


def said(directory, other):
    """Greedy tokens and their logprobs, after each way of loading."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1)

    def answer():
        output = llm.generate(PROMPT, sampling, use_tqdm=False)[0].outputs[0]
        probabilities = [next(iter(step.values())).logprob for step in output.logprobs]
        return [list(output.token_ids), probabilities]

    options = {"max_model_len": 128, "enforce_eager": True}
    llm = LLM(directory, load_format="dummy", enable_prefix_caching=False, **options)
    found = {"dummy": answer()}
    auto = {"load_config": {"load_format": "auto"}}
    llm.collective_rpc("update_config", args=(auto,))
    for name, path in {"first": directory, "other": other, "again": directory}.items():
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        found[name] = answer()
    del llm
    cleanup_dist_env_and_memory()
    return found


def main(words):
    multiply_fp8_fast()
    if os.environ.get("STAND_IN"):
        from stand_in import stand_in

        stand_in()
    out, *directories = words
    pairs = zip(directories[::2], directories[1::2], strict=True)
    with open(out, "w") as file:
        json.dump({pair[0]: said(*pair) for pair in pairs}, file)


if __name__ == "__main__":
    main(sys.argv[1:])
