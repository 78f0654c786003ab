# SPDX-License-Identifier: Apache-2.0
"""
``oneshot`` on every rank, the way llm-compressor says, on CPUs.

``torchrun --nproc-per-node 2 host_way.py DENSE RECIPE OUT ROWS.json``
"""

import json
import sys

import torch
from compressed_tensors.offload.cache import DistributedCPUCache
from compressed_tensors.offload.module import offload_module
from datasets import Dataset
from llmcompressor import oneshot
from torch import distributed
from transformers import AutoModelForCausalLM

import nm_permute_plugin  # noqa: F401


def main(dense: str, recipe: str, out: str, rows: str) -> None:
    """Prune on all ranks, whose weights lie in memory that they share."""
    # init_dist() and load_context() want an accelerator; so does this what they do.
    distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for module in model.modules():
        offload_module(module, "cpu", "cpu")
    caches = {type(module._parameters) for module in model.modules()}
    assert caches == {DistributedCPUCache}, caches
    with open(rows) as file:
        ids = json.load(file)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids}),
        recipe=recipe,
        output_dir=out,
        max_seq_length=max(map(len, ids)),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
