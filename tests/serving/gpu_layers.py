# SPDX-License-Identifier: Apache-2.0
"""What must hold of layers on a GPU: ``gpu_checks.py`` runs it."""

import os
import tempfile
from pathlib import Path

import torch
from gpu_kernels import FEW, MANY
from weights import BOUND, Scales, error, exact, scales_for, sparse_weight

from nm_permute_plugin.serving import cache, kernel_table
from nm_permute_plugin.serving import linear as linear_module
from nm_permute_plugin.serving.detect import Mode
from nm_permute_plugin.serving.kernels.kernel import DTYPES_8
from nm_permute_plugin.serving.linear import SparseLinear
from nm_permute_plugin.serving.ops import TABLES
from nm_permute_plugin.serving.tune import random_tokens

# Of a layer: large enough to be measured fast, since it takes few copies to fill the L2
# cache, and for products of 8 bits to be offered in parts.
LAYER = (2560, 2048)


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
