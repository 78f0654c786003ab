# SPDX-License-Identifier: Apache-2.0
"""
What must hold on a GPU, as plain functions: pytest runs them, and so does this file.

Usage, where there is no pytest::

    PYTHONPATH=. python tests/serving/gpu_checks.py
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from weights import BOUND, DTYPES, error, exact, product_of, sparse_weight

from nm_permute_plugin.serving import linear, plan
from nm_permute_plugin.serving.kernels.kernel import NARROW
from nm_permute_plugin.serving.linear import SparseLinear
from nm_permute_plugin.serving.ops import KERNELS, PLANS

SHAPES = {
    "dense": [(96, 384)],
    "cusparselt": [(96, 384), (4096, 1408)],
    "mma_sp": [(32, 128), (96, 384), (1024, 4096), (4096, 1408)],
    "triton": [(96, 384)],
}
FEW = (1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64)
MANY = (1, 5, 65, 129, 1000, 4096)
TOKENS = {"dense": MANY, "cusparselt": MANY, "mma_sp": FEW, "triton": (1, 17, 64)}


def kernel_is_exact(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Every setting of a kernel agrees with float64, for odd numbers of tokens too."""
    kernel = KERNELS[name]
    weight = sparse_weight(*shape, dtype, device="cuda")
    if (reason := kernel.refusal(weight)) is not None:
        raise Skip(reason)
    form = kernel.prepare(weight)
    for tokens in TOKENS[name]:
        product = product_of(weight, tokens, bias=tokens % 2 == 1)
        expected = exact(weight, product)
        settings = kernel.candidates(form, product)
        if not settings:
            raise AssertionError(f"no settings for {tokens} tokens")
        for chosen in settings:
            wrong = error(kernel.run(form, product, chosen), expected)
            message = f"{name}{chosen} off by {wrong:.3g} for {tokens} tokens"
            if not wrong <= BOUND:
                raise AssertionError(message)


def layer_is_exact(dtype: torch.dtype) -> None:
    """A prepared layer agrees with float64, whatever the scales' sizes and the output."""
    weight = sparse_weight(256, 512, dtype, device="cuda")
    layer = prepared(weight, "auto")
    for tokens in (*FEW, *MANY, 8200, 0):
        for case in range(4 if dtype in NARROW else 1):
            product = product_of(
                weight,
                tokens,
                torch.float16 if case == 3 else torch.bfloat16,
                per_token=case != 1,
                per_channel=case != 2,
                bias=case > 0,
            )
            if dtype not in NARROW:
                out = layer(product.x)
            else:
                out = layer.scaled_mm(
                    product.x, *product.scales, product.bias, product.out_dtype
                )
            if out.shape != (tokens, 256) or out.dtype != product.out_dtype:
                raise AssertionError(f"got {out.dtype} {tuple(out.shape)}")
            wrong = error(out, exact(weight, product)) if tokens else 0.0
            if not wrong <= BOUND:
                raise AssertionError(
                    f"off by {wrong:.3g}: {tokens} tokens, case {case}"
                )


def layer_compiles(dtype: torch.dtype) -> None:
    """One compiled graph serves all numbers of tokens."""
    weight = sparse_weight(256, 512, dtype, device="cuda")
    layer = prepared(weight, "auto")

    def model(x: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
        if scales:
            return layer.scaled_mm(x, *scales, None, torch.bfloat16) + 1
        return layer(x) + 1

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for tokens in (3, 16, 70, 300):
        product = product_of(weight, tokens)
        scales = product.scales if dtype in NARROW else ()
        expected = exact(weight, product) + 1
        wrong = error(compiled(product.x, *scales), expected)
        if not wrong <= BOUND:
            raise AssertionError(f"off by {wrong:.3g} for {tokens} tokens")


def layer_is_captured(dtype: torch.dtype) -> None:
    """A captured CUDA graph computes with what its inputs hold at each replay."""
    weight = sparse_weight(256, 512, dtype, device="cuda")
    layer = prepared(weight, "auto")
    for tokens in (1, 13, 64, 300):
        product = product_of(weight, tokens)
        scales = product.scales if dtype in NARROW else ()
        x = torch.zeros_like(product.x)

        def call(x: torch.Tensor = x, scales: tuple = scales) -> torch.Tensor:
            if scales:
                return layer.scaled_mm(x, *scales, None, torch.bfloat16)
            return layer(x)

        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        x.copy_(product.x)
        graph.replay()
        torch.cuda.synchronize()
        wrong = error(out, exact(weight, product))
        if not wrong <= BOUND:
            raise AssertionError(f"off by {wrong:.3g} for {tokens} tokens")


def plan_is_kept() -> None:
    """A second process measures nothing; a damaged file is measured anew."""
    weight = sparse_weight(256, 512, torch.bfloat16, device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[plan.CACHE] = folder
        try:
            first = prepared_or_none(weight, "auto")
            (path,) = Path(folder).glob("*.json")
            kept = path.read_text()
            again = prepared_or_none(weight, "auto")
            if path.read_text() != kept or (first is None) != (again is None):
                raise AssertionError("the plan was measured again")
            path.write_text("{")
            prepared_or_none(weight, "auto")
            plan.Plan.from_json(path.read_text())
        finally:
            del os.environ[plan.CACHE]


def memory_mode_keeps_one_sparse_copy() -> None:
    """No dense weight, one form."""
    weight = sparse_weight(512, 1024, torch.bfloat16, device="cuda")
    layer = prepared(weight, "memory")
    if PLANS[layer.plan_name].kernels != ["cusparselt"]:
        raise AssertionError(f"kept {PLANS[layer.plan_name].kernels}")
    if sum(form.nbytes for form in layer.forms) > 0.6 * weight.nbytes:
        raise AssertionError("the copy is larger than the format")


def a_dense_weight_stays_dense() -> None:
    """Nothing is ever pruned."""
    weight = torch.ones(256, 512, device="cuda", dtype=torch.bfloat16)
    if prepared_or_none(weight, "auto") is not None:
        raise AssertionError("a dense weight was taken for 2:4")


def prepared(weight: torch.Tensor, mode: linear.Mode) -> SparseLinear:
    """A layer on sparse kernels only, so that small shapes use them too."""
    os.environ[linear.FORCED] = "mma_sp,cusparselt"
    try:
        layer = prepared_or_none(weight, mode)
    finally:
        del os.environ[linear.FORCED]
    if layer is None:
        raise AssertionError("the layer stayed dense")
    return layer


def prepared_or_none(weight: torch.Tensor, mode: linear.Mode) -> SparseLinear | None:
    """A layer with nothing remembered from earlier ones."""
    PLANS.clear()
    return SparseLinear.prepare("layer", weight, mode)


class Skip(Exception):
    """A check that this machine cannot make, with the reason."""


def kernel_is_exact_for_all_shapes(name: str, dtype: torch.dtype) -> None:
    """One process for all shapes of a kernel and dtype."""
    for shape in SHAPES[name]:
        kernel_is_exact(name, dtype, shape)


CHECKS: dict[str, Callable[[], None]] = {
    f"{name} {kind}": partial(kernel_is_exact_for_all_shapes, name, dtype)
    for name in ("mma_sp", "triton", "dense", "cusparselt")
    for kind, dtype in DTYPES.items()
} | {
    f"{check.__name__} {kind}": partial(check, dtype)
    for check in (layer_is_exact, layer_compiles, layer_is_captured)
    for kind, dtype in DTYPES.items()
} | {
    check.__name__: check
    for check in (
        plan_is_kept,
        memory_mode_keeps_one_sparse_copy,
        a_dense_weight_stays_dense,
    )
}  # fmt: skip


def run_one(name: str) -> None:
    """A check and its line; exits with 1 if it failed."""
    started = time.perf_counter()
    failed = False
    try:
        CHECKS[name]()
        outcome = "ok"
    except Skip as reason:
        outcome = f"skipped: {reason}"
    except Exception as wrong:
        failed = True
        outcome = f"FAILED: {type(wrong).__name__}: {str(wrong).splitlines()[0]}"
        if not isinstance(wrong, AssertionError):
            traceback.print_exc(limit=-4)
    print(f"{time.perf_counter() - started:6.2f} s  {name}: {outcome}", flush=True)
    sys.exit(int(failed))


def in_child(name: str) -> bool:
    """Whether a check passes in a process of its own."""
    command = [sys.executable, __file__, name]
    try:
        return subprocess.run(command, timeout=150, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"        {name}: FAILED: no end after 150 s", flush=True)
        return False


def main() -> int:
    """
    Run every check in a process of its own; the number of those that failed.

    A kernel that crashes takes its whole process with it. Eight run at a time: what is
    checked is right or wrong, not fast or slow.
    """
    logging.basicConfig(level=logging.INFO)
    os.environ.setdefault(plan.CACHE, tempfile.mkdtemp())
    with ThreadPoolExecutor(8) as pool:
        passed = list(pool.map(in_child, CHECKS))
    failed = [name for name, ok in zip(CHECKS, passed, strict=True) if not ok]
    print(f"{len(CHECKS)} checks, {len(failed)} failed: {failed}", flush=True)
    return len(failed)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_one(sys.argv[1])
    sys.exit(min(main(), 1))
