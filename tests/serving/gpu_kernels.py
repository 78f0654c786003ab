# SPDX-License-Identifier: Apache-2.0
"""What must hold of kernels on a GPU: ``gpu_checks.py`` runs it."""

from unittest.mock import patch

import torch
from weights import (
    BOUND,
    error,
    exact,
    exact_experts,
    expert_weights,
    sparse_weight,
)

from nm_permute_plugin.checkpoint.codec import clear_negative_zeros
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.serving.expert_table import routing_of
from nm_permute_plugin.serving.kernels import cusparselt, experts
from nm_permute_plugin.serving.kernels.cusparselt_plan import plan_of
from nm_permute_plugin.serving.ops import KERNELS
from nm_permute_plugin.serving.tune import random_tokens

SHAPES = {
    "dense": [(96, 384)],
    "cusparselt": [(96, 384), (4096, 1408)],
    "mma_sp": [(32, 128), (96, 384), (1024, 4096), (4096, 1408)],
    "triton": [(96, 384)],
}
FEW = (1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64)
MANY = (1, 5, 65, 129, 1000, 4100)
TOKENS = {"dense": MANY, "cusparselt": MANY, "mma_sp": FEW, "triton": (1, 17, 64)}


class Skip(Exception):
    """A check that this machine cannot make, with the reason."""


def kernel_is_exact(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Every setting of a kernel agrees with float64, for odd numbers of tokens too."""
    kernel = KERNELS[name]
    weight = sparse_weight(*shape, dtype, device="cuda")
    if (reason := kernel.unsupported(weight)) is not None:
        raise Skip(reason)
    packed = kernel.prepare(weight)
    for tokens in TOKENS[name]:
        x = random_tokens(weight, tokens)
        expected = exact(weight, x)
        settings = kernel.candidates(packed, x, len(weight))
        if not settings:
            raise AssertionError(f"no settings for {tokens} tokens")
        for chosen in settings:
            wrong = error(kernel.run(packed, x, len(weight), chosen), expected)
            message = f"{name}{chosen} off by {wrong:.3g} for {tokens} tokens"
            if not wrong <= BOUND:
                raise AssertionError(message)


def kernel_is_exact_for_all_shapes(name: str, dtype: torch.dtype) -> None:
    """One process for all shapes of a kernel and dtype."""
    for shape in SHAPES[name]:
        kernel_is_exact(name, dtype, shape)


def experts_are_exact(dtype: torch.dtype) -> None:
    """Every setting of the kernel of experts agrees with float64; weights come back."""
    weights = expert_weights(8, 1024, 768, dtype, "cuda")
    up, down = (experts.pack_experts(weight) for weight in weights)
    for weight, packed in zip(weights, (up, down), strict=True):
        if not torch.equal(packed.expand(torch.ones_like(weight)), weight):
            raise AssertionError("a weight came back with other bits")
    places = torch.tensor([3, -1, 0, 1, 7, 5, 4, -1], dtype=torch.int32, device="cuda")
    for tokens, here in ((1, None), (9, places), (16, None), (64, places), (200, None)):
        x, scales, ids = routing_of(up, tokens, 3, tokens)
        known = ids if here is None else here[ids.long()]
        expected = exact_experts(*weights, x, scales, known)
        for settings in experts.candidates(up, down, tokens, 3):
            out = experts.run(x, up, down, scales, ids, settings, here)
            wrong = error(out, expected)
            message = f"{settings} off by {wrong:.3g} for {tokens} tokens"
            if not wrong <= BOUND:
                raise AssertionError(message)


def plans_multiply_as_torch_does(dtype: torch.dtype) -> None:
    """A product by a plan that is kept has the bits of the one that torch makes."""
    weight = sparse_weight(4096, 1408, dtype, device="cuda")
    kernel = KERNELS["cusparselt"]
    packed = kernel.prepare(weight)
    for tokens in (1, 33, 1000):
        x = random_tokens(weight, tokens)
        for chosen in kernel.candidates(packed, x, len(weight)):
            with patch.object(cusparselt, "plan_of", wraps=plan_of) as asked:
                kept = kernel.run(packed, x, len(weight), chosen)
            if None in [plan_of(*call.args) for call in asked.call_args_list]:
                raise AssertionError(f"{chosen} has no plan for {tokens} tokens")
            with patch.object(cusparselt, "plan_of", return_value=None):
                torchs = kernel.run(packed, x, len(weight), chosen)
            if not torch.equal(kept, torchs):
                raise AssertionError(f"{chosen} differs for {tokens} tokens")
    plan_of.cache_clear()  # which frees what the library holds


def kernel_is_steady(dtype: torch.dtype, runs: int = 100) -> None:
    """Our CUDA kernel gives the same bits every time: warps and the copy engine race."""
    kernel = KERNELS["mma_sp"]
    weight = sparse_weight(4096, 4096, dtype, device="cuda")
    if (reason := kernel.unsupported(weight)) is not None:
        raise Skip(reason)
    packed = kernel.prepare(weight)
    for tokens in (1, 8, 64):
        x = random_tokens(weight, tokens)
        for chosen in kernel.candidates(packed, x, len(weight)):
            outs = [kernel.run(packed, x, len(weight), chosen) for _ in range(runs)]
            others = sum(not torch.equal(outs[0], out) for out in outs)
            if others:
                message = f"{chosen} differs in {others} of {runs} runs"
                raise AssertionError(f"{message} for {tokens} tokens")


def weights_come_back(name: str, dtype: torch.dtype) -> None:
    """A kernel's packed weight is unpacked bit by bit."""
    kernel = KERNELS[name]
    for shape in SHAPES[name]:
        weight = clear_negative_zeros(sparse_weight(*shape, dtype, device="cuda"))
        if (reason := kernel.unsupported(weight)) is not None:
            raise Skip(reason)
        back = kernel.unpack(kernel.prepare(weight), shape, dtype)
        if not torch.equal(back.view(WORDS[dtype]), weight.view(WORDS[dtype])):
            raise AssertionError(f"{shape} came back with other bits")
