# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's library for 2:4 products, with the algorithm searched for each size."""

import logging
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.cusparselt_plan import Size, multiply, plan_of
from nm_permute_plugin.serving.kernels.kernel import (
    NARROW,
    WIDE,
    Settings,
    padded,
    sums_dtype,
    unknown,
)

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

# Settings: algorithm, parts of the channels, how these are added up.
_DEFAULT = (0, 1, -1)

# The search fails in float16, or crashes (H100, torch 2.11).
_SEARCHED = (torch.bfloat16, *NARROW)

# The search tries kernels that small odd shapes crash ("illegal instruction" at 96 x 384,
# version 0.8), and a crash ends the process.
_SAFE = 128


@dataclass(frozen=True)
class CuSparseLt:
    """cuSPARSELt through torch."""

    name: str = "cusparselt"

    def refusal(self, weight: Tensor) -> str | None:
        rows, channels = weight.shape
        if reason := unknown(weight.dtype, WIDE + NARROW):
            return reason
        if not weight.is_cuda:
            return "no CUDA device"
        if not torch.backends.cusparselt.is_available():
            return "this build of torch has no cuSPARSELt"
        multiple = 16 if weight.dtype in WIDE else 32
        if rows % multiple or channels % multiple:
            return f"{rows} x {channels} is no multiple of {multiple}"
        return None

    def prepare(self, weight: Tensor) -> Tensor:
        return torch._cslt_compress(weight)

    def candidates(self, form: Tensor, x: Tensor, rows: int) -> list[Settings]:
        tokens, channels = x.shape
        if x.dtype not in _SEARCHED or rows % _SAFE or channels % _SAFE:
            return [_DEFAULT]
        try:
            return list(dict.fromkeys((_search(form, x), _DEFAULT)))
        except RuntimeError as error:
            logger.info(
                "cuSPARSELt's search failed for %d tokens by %d x %d, %s, which leaves "
                "its default algorithm: %s",
                *(tokens, rows, channels, x.dtype, error),
            )
            return [_DEFAULT]

    def run(self, form: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        number, parts, how = settings
        tokens, out_dtype = _aligned(x), sums_dtype(x.dtype)
        count, channels = tokens.shape
        shape = (x.get_device(), rows, channels, count)
        plan = plan_of(Size(*shape, x.dtype, out_dtype, number, parts, how))
        if plan is not None:
            out = multiply(plan, form, tokens)
        else:
            out = torch._cslt_sparse_mm(
                form,
                tokens.t(),
                out_dtype=_named(x.dtype),
                transpose_result=True,
                alg_id=number,
                split_k=parts,
                split_k_mode=how,
            )
        return out if tokens is x else out[: x.shape[0]]


def _aligned(x: Tensor) -> Tensor:
    """The tokens, contiguous, as many as the library's alignment asks for."""
    return padded(x, 8 if x.dtype in WIDE else 16).contiguous()


def _named(dtype: torch.dtype) -> torch.dtype | None:
    """The outputs' dtype as torch takes it, which refuses one where it has no choice."""
    return None if dtype in WIDE else sums_dtype(dtype)


def _search(form: Tensor, x: Tensor) -> Settings:
    """The library's own choice after it has tried its algorithms."""
    arguments = (form, _aligned(x).t(), None, None, _named(x.dtype), True)
    bindings = getattr(torch._C, "_cusparselt", None)
    if bindings is not None and hasattr(bindings, "mm_search"):
        algorithm, parts, how, _ = bindings.mm_search(*arguments)
        return int(algorithm), int(parts), int(how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return int(torch._cslt_sparse_mm_search(*arguments)), 1, -1
