# SPDX-License-Identifier: Apache-2.0
"""
Runs the kernel of routed experts where a crash ends no server: see ``probe.py``.
"""

import sys

import torch

from nm_permute_plugin.serving.expert_table import dense_weights, routing_of
from nm_permute_plugin.serving.kernel_table import BUCKETS
from nm_permute_plugin.serving.kernels import experts
from nm_permute_plugin.serving.kernels.experts import PackedExperts, pack_experts
from nm_permute_plugin.serving.tune import random_weight


def try_settings(up: PackedExperts, down: PackedExperts, top_k: int) -> None:
    """
    Run every setting at every number of tokens; those that are refused are no crash.

    Each runs twice: with all experts on this device, and without the last one, as with
    expert parallelism.

    :param up: [experts, 2 * inner, hidden]
    :param down: [experts, hidden, inner]
    :param top_k: experts of a token
    """
    count = len(up.packed)
    places = torch.arange(count, dtype=torch.int32, device=up.packed.device)
    places[-1] = -1
    dense_weights(up, down)
    for tokens in BUCKETS:
        x, weights, ids = routing_of(up, tokens, top_k, 0)
        for settings in experts.candidates(up, down, tokens, top_k):
            try:
                for here in (None, places):
                    experts.run(x, up, down, weights, ids, settings, here)
            except RuntimeError as error:
                print(f"{settings}, {tokens} tokens: {error}")
            if up.packed.is_cuda:
                torch.cuda.synchronize()  # raises if the context is lost


def main(
    count: str, inner: str, hidden: str, top_k: str, dtype: str, device: str
) -> None:
    """Make experts of a shape, and try the kernel on them."""
    torch.cuda.set_device(device)
    shapes = (2 * int(inner), int(hidden)), (int(hidden), int(inner))
    one = (random_weight(shape, getattr(torch, dtype), device) for shape in shapes)
    up, down = (pack_experts([weight] * int(count)) for weight in one)
    try_settings(up, down, int(top_k))


if __name__ == "__main__":
    main(*sys.argv[1:])
