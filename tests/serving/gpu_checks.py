# SPDX-License-Identifier: Apache-2.0
"""
What must hold on a GPU, as plain functions: pytest runs them, and so does this file.

Usage, where there is no pytest::

    PYTHONPATH=. python tests/serving/gpu_checks.py [BEGINNING_OF_NAMES...]
"""

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from inspect import unwrap
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from weights import (
    BOUND,
    DTYPES,
    Scales,
    error,
    exact,
    scales_for,
    sparse_weight,
)

from nm_permute_plugin.checkpoint.codec import clear_negative_zeros
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.serving import cache, kernel_table
from nm_permute_plugin.serving import linear as linear_module
from nm_permute_plugin.serving.accelerate import accelerate
from nm_permute_plugin.serving.accelerated_linear import AcceleratedLinear
from nm_permute_plugin.serving.card_check import check_card
from nm_permute_plugin.serving.detect import Mode
from nm_permute_plugin.serving.kernels import cusparselt
from nm_permute_plugin.serving.kernels.cusparselt_plan import plan_of
from nm_permute_plugin.serving.kernels.kernel import DTYPES_8
from nm_permute_plugin.serving.linear import SparseLinear
from nm_permute_plugin.serving.ops import KERNELS, TABLES
from nm_permute_plugin.serving.quantized_linear import quantize
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

# Of a layer: large enough to be measured fast, since it takes few copies to fill the L2
# cache, and for products of 8 bits to be offered in parts.
LAYER = (2560, 2048)


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


def layer_works(dtype: torch.dtype) -> None:
    """A layer, prepared once: exact as it is, compiled and captured."""
    weight = sparse_weight(*LAYER, dtype, device="cuda")
    layer = prepared(weight, "auto")
    checks = (layer_is_exact, layer_is_captured, layer_compiles, layer_is_refilled)
    for check in checks:
        try:
            check(layer, weight)
        except Exception as wrong:
            wrong.add_note(f"in {check.__name__}")
            raise


def layer_is_exact(layer: SparseLinear, weight: torch.Tensor) -> None:
    """It agrees with float64, whatever the scales' sizes and the output."""
    for tokens in (*FEW, *MANY, 8200, 0):
        x = random_tokens(weight, tokens)
        for case in range(4 if weight.dtype in DTYPES_8 else 1):
            scales = None
            if weight.dtype in DTYPES_8:
                scales = scales_for(
                    *(weight, tokens),
                    torch.float16 if case == 3 else torch.bfloat16,
                    per_token=case != 1,
                    per_channel=case != 2,
                    bias=case > 0,
                )
            out = layer(x) if scales is None else layer.scaled_mm(x, *scales)
            dtype = x.dtype if scales is None else scales.out_dtype
            if out.shape != (tokens, len(weight)) or out.dtype != dtype:
                raise AssertionError(f"got {out.dtype} {tuple(out.shape)}")
            wrong = error(out, exact(weight, x, scales)) if tokens else 0.0
            if not wrong <= BOUND:
                raise AssertionError(
                    f"off by {wrong:.3g}: {tokens} tokens, case {case}"
                )


def layer_compiles(layer: SparseLinear, weight: torch.Tensor) -> None:
    """One compiled graph serves all numbers of tokens."""

    def model(x: torch.Tensor, scales: Scales | None) -> torch.Tensor:
        return (layer(x) if scales is None else layer.scaled_mm(x, *scales)) + 1

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for tokens in (3, 16, 70, 300):
        x = random_tokens(weight, tokens)
        scales = scales_for(weight, tokens) if weight.dtype in DTYPES_8 else None
        wrong = error(compiled(x, scales), exact(weight, x, scales) + 1)
        if not wrong <= BOUND:
            raise AssertionError(f"off by {wrong:.3g} for {tokens} tokens")


def layer_is_captured(layer: SparseLinear, weight: torch.Tensor) -> None:
    """A captured CUDA graph computes with what its inputs hold at each replay."""
    for tokens in (1, 13, 64, 300):
        x = random_tokens(weight, tokens)
        scales = scales_for(weight, tokens) if weight.dtype in DTYPES_8 else None
        expected = exact(weight, x, scales)
        read = torch.zeros_like(x)

        def call(read: torch.Tensor, scales: Scales | None) -> torch.Tensor:
            return layer(read) if scales is None else layer.scaled_mm(read, *scales)

        call(read, scales)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(read, scales)
        read.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        wrong = error(out, expected)
        if not wrong <= BOUND:
            raise AssertionError(f"off by {wrong:.3g} for {tokens} tokens")


def layer_is_refilled(layer: SparseLinear, weight: torch.Tensor) -> None:
    """A captured CUDA graph computes with the weight that was filled in since."""
    other = weight.view(torch.uint8).flip(0).contiguous().view(weight.dtype)
    x = random_tokens(weight, 13)
    scales = scales_for(weight, 13) if weight.dtype in DTYPES_8 else None

    def call() -> torch.Tensor:
        return layer(x) if scales is None else layer.scaled_mm(x, *scales)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    layer.refill(SparseLinear(other, layer.table_name))
    graph.replay()
    torch.cuda.synchronize()
    wrong = error(out, exact(other, x, scales))
    if not wrong <= BOUND:
        raise AssertionError(f"off by {wrong:.3g} after another weight was filled in")


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


def kernel_table_is_kept() -> None:
    """A second process measures nothing; a damaged file is measured anew."""
    weight = sparse_weight(*LAYER, torch.bfloat16, device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[cache.FOLDER] = folder
        try:
            first = prepared_or_none(weight, "auto")
            (path,) = Path(folder).glob("*.json")
            kept = path.read_text()
            again = prepared_or_none(weight, "auto")
            if path.read_text() != kept or (first is None) != (again is None):
                raise AssertionError("the kernel table was measured again")
            path.write_text("{")
            prepared_or_none(weight, "auto")
            kernel_table.KernelTable.from_json(path.read_text())
        finally:
            del os.environ[cache.FOLDER]


def memory_mode_keeps_one_sparse_copy() -> None:
    """No dense weight, one packed weight."""
    weight = sparse_weight(*LAYER, torch.bfloat16, device="cuda")
    layer = prepared(weight, "memory")
    if TABLES[layer.table_name].kernels != ["cusparselt"]:
        raise AssertionError(f"kept {TABLES[layer.table_name].kernels}")
    if sum(packed.nbytes for packed in layer.packed) > 0.6 * weight.nbytes:
        raise AssertionError("the copy is larger than the format")


def a_dense_weight_stays_dense() -> None:
    """Nothing is ever pruned."""
    weight = torch.ones(256, 512, device="cuda", dtype=torch.bfloat16)
    if prepared_or_none(weight, "auto") is not None:
        raise AssertionError("a dense weight was taken for 2:4")


def the_card_is_checked() -> None:
    """``bench-serve --check`` finds nothing wrong."""
    text = check_card(shapes=[LAYER])
    if "WRONG" in text or "by PyTorch" in text:
        raise AssertionError(text)


def prepared(weight: torch.Tensor, mode: Mode) -> SparseLinear:
    """A layer on sparse kernels only, so that small shapes use them too."""
    os.environ[linear_module.FORCED] = "mma_sp,cusparselt"
    try:
        layer = prepared_or_none(weight, mode)
    finally:
        del os.environ[linear_module.FORCED]
    if layer is None:
        raise AssertionError("the layer stayed dense")
    return layer


def prepared_or_none(weight: torch.Tensor, mode: Mode) -> SparseLinear | None:
    """A layer with nothing remembered from earlier ones."""
    TABLES.clear()
    layer = SparseLinear.prepare(weight, mode)
    return None if isinstance(layer, str) else layer


class Skip(Exception):
    """A check that this machine cannot make, with the reason."""


def kernel_is_exact_for_all_shapes(name: str, dtype: torch.dtype) -> None:
    """One process for all shapes of a kernel and dtype."""
    for shape in SHAPES[name]:
        kernel_is_exact(name, dtype, shape)


CHECKS: dict[str, Callable[[], None]] = (
    {"a_dense_weight_stays_dense": a_dense_weight_stays_dense}
    | {
        f"{name} {kind}": partial(kernel_is_exact_for_all_shapes, name, dtype)
        for name in ("dense", "triton", "mma_sp", "cusparselt")
        for kind, dtype in DTYPES.items()
    }
    | {
        f"plans {kind}": partial(plans_multiply_as_torch_does, dtype)
        for kind, dtype in DTYPES.items()
    }
    | {
        f"unpack {name} {kind}": partial(weights_come_back, name, dtype)
        for name in ("triton", "mma_sp", "cusparselt")
        for kind, dtype in DTYPES.items()
    }
    | {
        f"accelerate {kind} {mode}": partial(accelerated_model, DTYPES[kind], mode)
        for kind in ("bf16", "fp16")
        for mode in ("auto", "memory")
    }
    | {
        f"accelerate {kind}": partial(accelerated_8_bits, DTYPES[kind])
        for kind in ("fp8", "int8")
    }
    | {f"layer {kind}": partial(layer_works, dtype) for kind, dtype in DTYPES.items()}
    | {
        check.__name__: check
        for check in (
            memory_mode_keeps_one_sparse_copy,
            kernel_table_is_kept,
            the_card_is_checked,
        )
    }
)
"""By name, the cheap ones first."""


def outcome_of(name: str) -> str:
    """``ok``, or ``skipped`` or ``FAILED`` with the reason."""
    try:
        CHECKS[name]()
    except Skip as reason:
        return f"skipped: {reason}"
    except Exception as wrong:
        if not isinstance(wrong, AssertionError):
            traceback.print_exc(limit=-4)
        where = " ".join(("", *getattr(wrong, "__notes__", ())))
        first = (str(wrong).splitlines() or [""])[0]
        return f"FAILED{where}: {type(wrong).__name__}: {first[:300]}"
    return "ok"


def run_one(name: str) -> None:
    """A check and its line; exits with 1 if it failed."""
    started = time.perf_counter()
    outcome = outcome_of(name)
    say(started, name, outcome)
    sys.exit(int(outcome.startswith("FAILED")))


def say(started: float, name: str, outcome: str) -> None:
    """A line, at once."""
    print(f"{time.perf_counter() - started:6.2f} s  {name}: {outcome}", flush=True)


def in_children(names: list[str], at_once: int = 8, most: float = 150) -> list[str]:
    """
    Run checks in a process each, for a kernel that crashes takes its process with it.

    They are forks, which need not import torch again: this process leaves the GPU alone.

    :param at_once: what is checked is right or wrong, not fast or slow
    :param most: seconds that a check may take
    :return: the names of those that failed
    """
    fork = get_context("fork")
    waiting, running, failed = list(names), {}, []
    while waiting or running:
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            process = fork.Process(target=run_one, args=(name,))
            process.start()
            running[process.sentinel] = (name, process, time.perf_counter())
        ended = wait(running, timeout=1)
        for sentinel, (name, process, started) in list(running.items()):
            if sentinel not in ended:
                if time.perf_counter() - started > most:
                    process.kill()
                continue
            process.join()
            del running[sentinel]
            if process.exitcode:
                failed.append(name)
            if process.exitcode < 0:  # it could not say so itself
                ending = signal.Signals(-process.exitcode).name
                say(started, name, f"FAILED: ended with {ending}")
    return failed


def main() -> int:
    """Run every check; the number of those that failed."""
    logging.basicConfig(level=logging.INFO)
    os.environ.setdefault(cache.FOLDER, tempfile.mkdtemp())
    names = [name for name in CHECKS if name.startswith(tuple(sys.argv[1:] or [""]))]
    failed = in_children(names)
    print(f"{len(names)} checks, {len(failed)} failed: {failed}", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
