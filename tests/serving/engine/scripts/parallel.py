# SPDX-License-Identifier: Apache-2.0
"""
``generate.py`` by two processes, with two faults mended that vLLM 0.32 has on CPUs.

With either vLLM dies at its first words, with a dense checkpoint too.
"""

import sys

import generate
import torch
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

stock = CPUUnquantizedExperts.apply


def apply(self, expert_map, topk_ids, topk_weights, **more):
    """Multiply by the experts of this process, as the other ones are not in its memory."""
    if expert_map is not None:
        places = expert_map[topk_ids.long()]
        topk_weights = torch.where(places < 0, 0, topk_weights)
        topk_ids = places.clamp_min(0).to(topk_ids.dtype)
    words = {"topk_ids": topk_ids, "topk_weights": topk_weights, **more}
    return stock(self, expert_map=None, **words)


# here: the workers' processes read this module as well
CPUUnquantizedExperts.apply = apply
# without a first run there is no room for what one stage of a pipeline hands to the next
CPUWorker._should_warm_up_model = lambda self: True
CPUModelRunner.warming_up_model = lambda self: self.profile_run()

if __name__ == "__main__":
    generate.main(sys.argv[1:])
