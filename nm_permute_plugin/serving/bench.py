# SPDX-License-Identifier: Apache-2.0
"""
Times prefill and decode of one engine; runs as a process of its own.

``python -m nm_permute_plugin.serving.bench CHECKPOINT OUT.json '{"batches": [1, 8]}'``.
The engine's memory and its compiled graphs end with the process.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARM_UP = 1
"""So many runs of each size come before those that are timed."""


@dataclass(frozen=True)
class Workload:
    """
    What is timed.

    :param batches: the numbers of sequences that are generated at once
    :param prompt_tokens: random tokens in each sequence's prompt
    :param output_tokens: tokens that each sequence generates, greedily
    :param repeats: timed runs, whose median is taken
    :param tensor_parallel: the number of devices
    :param eager: run without compiled graphs
    :param engine: further arguments of ``vllm.LLM``; they override those above
    """

    batches: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 512
    output_tokens: int = 128
    repeats: int = 3
    tensor_parallel: int = 1
    eager: bool = False
    engine: Mapping[str, object] = field(default_factory=dict)


def engine_arguments(text: str) -> dict[str, object]:
    """
    Parse arguments of ``vllm.LLM`` from a JSON object.

    :raises ValueError: if the text is no JSON object

    >>> engine_arguments('{"gpu_memory_utilization": 0.8}')
    {'gpu_memory_utilization': 0.8}
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--engine {text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"--engine {text!r} is no JSON object; write it like "
            '{"attention_backend": "TRITON_ATTN"}'
        )
    return found


def measure_engine(checkpoint: Path, workload: Workload) -> list[dict[str, object]]:
    """
    Time an engine; the keys are the fields of ``evaluation.throughput.Measurement``.

    Prefill ends with the first token. Decode is all further tokens: its time is that of a
    whole answer minus that of the prefill.
    """
    from nm_permute_plugin.serving.vllm_names import engine

    LLM, _ = engine()
    arguments: dict[str, Any] = {
        "max_model_len": workload.prompt_tokens + workload.output_tokens,
        "max_num_seqs": max(workload.batches),
        "tensor_parallel_size": workload.tensor_parallel,
        "enforce_eager": workload.eager,
        "skip_tokenizer_init": True,  # tokens in, tokens out
        "enable_prefix_caching": False,
        "seed": 0,
    }
    llm = LLM(str(checkpoint), **{**arguments, **workload.engine})
    steps = workload.output_tokens - 1
    found: list[dict[str, object]] = []
    for batch, prefill, whole in _timings(llm, workload):
        tokens = batch * workload.prompt_tokens
        fields = {"phase": "prefill", "batch": batch}
        found.append({**fields, "tokens": tokens, "steps": 1, "seconds": prefill})
        fields = {"phase": "decode", "batch": batch, "tokens": batch * steps}
        found.append({**fields, "steps": steps, "seconds": whole - prefill})
    return found


def _timings(llm: Any, workload: Workload) -> Iterator[tuple[int, float, float]]:
    """Yield each batch size with its seconds of a prefill and of a whole answer."""
    from nm_permute_plugin.serving.vllm_names import engine

    _, SamplingParams = engine()
    source = random.Random(0)
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()

    def seconds(batch: int, tokens: int) -> float:
        size = workload.prompt_tokens
        drawn = [source.choices(range(vocabulary), k=size) for _ in range(batch)]
        prompts = [{"prompt_token_ids": prompt} for prompt in drawn]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        started = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - started

    for batch in workload.batches:
        timings = []
        for tokens in (1, workload.output_tokens):
            runs = [seconds(batch, tokens) for _ in range(WARM_UP + workload.repeats)]
            timings.append(statistics.median(runs[WARM_UP:]))
        yield batch, timings[0], timings[1]


def _main(checkpoint: str, out: str, fields: str) -> None:
    loaded = json.loads(fields)
    workload = Workload(**{**loaded, "batches": tuple(loaded["batches"])})
    Path(out).write_text(json.dumps(measure_engine(Path(checkpoint), workload)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
