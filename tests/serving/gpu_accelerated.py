# SPDX-License-Identifier: Apache-2.0
"""What must hold of models that ``accelerate`` changed: ``gpu_checks.py`` runs it."""

import os
from inspect import unwrap
from types import SimpleNamespace
from unittest.mock import patch

import torch
from gpu_layers import LAYER
from weights import BOUND, Scales, error, exact, sparse_weight

from nm_permute_plugin.checkpoint.codec import clear_negative_zeros
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.serving import linear as linear_module
from nm_permute_plugin.serving.accelerate import accelerate
from nm_permute_plugin.serving.accelerated_linear import AcceleratedLinear
from nm_permute_plugin.serving.detect import Mode
from nm_permute_plugin.serving.ops import TABLES
from nm_permute_plugin.serving.quantized_linear import quantize
from nm_permute_plugin.serving.tune import random_tokens


def accelerated_model(dtype: torch.dtype, mode: Mode) -> None:
    """Two linears: exact, compiled into one captured graph, and undone bit by bit."""
    model = torch.nn.Sequential(
        torch.nn.Linear(*reversed(LAYER), bias=True, dtype=dtype, device="cuda"),
        torch.nn.Linear(*LAYER, bias=False, dtype=dtype, device="cuda"),
    ).requires_grad_(False)
    for seed, linear in enumerate(model):
        shape = linear.weight.shape
        linear.weight.data = sparse_weight(*shape, dtype, seed, "cuda") / 64
        linear.weight.data = clear_negative_zeros(linear.weight.data)
    before = [linear.weight.clone() for linear in model]
    allowed = "cusparselt" if mode == "memory" else "mma_sp,cusparselt"
    TABLES.clear()
    with patch.dict(os.environ, {linear_module.FORCED: allowed}):
        accelerate(model, mode=mode)
    if not all(isinstance(linear, AcceleratedLinear) for linear in model):
        raise AssertionError("a linear stayed dense")
    held = [t for m in model for t in (*m.buffers(), m.emptied)]
    share = sum(t.untyped_storage().nbytes() for t in held)
    share /= sum(weight.nbytes for weight in before)
    if not share < (0.6 if mode == "memory" else 1.2):
        raise AssertionError(f"the weights take {share:.2f} of the dense ones' memory")
    torch.compiler.reset()
    for name in ("forward", "product"):  # without pytest's checks of types
        setattr(AcceleratedLinear, name, unwrap(getattr(AcceleratedLinear, name)))
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for tokens in (1, 16, 33, 300):
            x = random_tokens(before[0], tokens)
            middle = torch.nn.functional.linear(x, before[0], model[0].bias)
            expected = exact(before[1], middle)
            for call in (model, compiled, compiled, compiled):
                torch.compiler.cudagraph_mark_step_begin()
                wrong = error(call(x[:, None]).squeeze(1), expected)
                if not wrong <= 2 * BOUND:
                    raise AssertionError(f"off by {wrong:.3g} for {tokens} tokens")
    accelerate(model, undo=True)
    words = WORDS[dtype]
    for linear, weight in zip(model, before, strict=True):
        if not torch.equal(linear.weight.view(words), weight.view(words)):
            raise AssertionError("a weight came back with other bits")


def accelerated_8_bits(dtype: torch.dtype) -> None:
    """A linear as compressed-tensors has it: exact, eagerly and compiled, and undone."""
    linear = torch.nn.Linear(*reversed(LAYER), bias=False, device="cuda")
    weight = clear_negative_zeros(sparse_weight(*LAYER, dtype, device="cuda"))
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    scale = (torch.rand(len(weight), 1, device="cuda") / 1000).bfloat16()
    linear.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    eight = {"num_bits": 8, "symmetric": True}
    linear.quantization_scheme = SimpleNamespace(
        weights=SimpleNamespace(**eight, strategy="channel"),
        input_activations=SimpleNamespace(**eight, strategy="token", dynamic=True),
        output_activations=None,
    )
    linear.forward = linear.forward
    TABLES.clear()
    with patch.dict(os.environ, {linear_module.FORCED: "mma_sp,cusparselt"}):
        accelerate(linear)
    torch.compiler.reset()
    for name in ("forward", "product"):  # without pytest's checks of types
        setattr(AcceleratedLinear, name, unwrap(getattr(AcceleratedLinear, name)))
    compiled = torch.compile(linear, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for tokens in (1, 16, 300):
            x = torch.randn(tokens, LAYER[1], device="cuda").bfloat16()
            x_q, scale_x = quantize(x, dtype, None)
            scales = Scales(scale_x, scale, None, torch.bfloat16)
            expected = exact(weight, x_q, scales)
            # compiled, inputs may be quantized to the next value
            for call, most in ((linear, BOUND), (compiled, 0.03), (compiled, 0.03)):
                torch.compiler.cudagraph_mark_step_begin()
                wrong = error(call(x[None])[0], expected)
                if not wrong <= most:
                    raise AssertionError(f"off by {wrong:.3g} for {tokens} tokens")
    accelerate(linear, undo=True)
    if not torch.equal(linear.weight.view(torch.int8), weight.view(torch.int8)):
        raise AssertionError("the weight came back with other bits")
    if "quantization_scheme" not in vars(linear) or "forward" not in vars(linear):
        raise AssertionError("compressed-tensors does not run the linear again")
