# SPDX-License-Identifier: Apache-2.0
"""cuSPARSELt, NVIDIA's library for 2:4 products; its algorithm is searched per size."""

import logging
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.cusparselt_plan import (
    ProductSize,
    multiply,
    plan_of,
)
from nm_permute_plugin.serving.kernels.kernel import (
    DTYPES_8,
    DTYPES_16,
    Settings,
    output_dtype,
    padded,
    unsupported_card,
    unsupported_dtype,
)

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

_DEFAULT = (0, 1, -1)
"""The settings (algorithm id, split-K, split-K mode) that work for every size."""

_SEARCHED = (torch.bfloat16, *DTYPES_8)
"""The search runs for these dtypes only: in float16 it fails or crashes (torch 2.11)."""

_UNPACKED = 1024
"""So many channels of a weight are unpacked at a time."""

_SAFE_MULTIPLE = 128
"""The search runs for multiples of this many rows and channels only: it crashes, and ends
the process, for small odd shapes ("illegal instruction" at 96 x 384, version 0.8)."""


@dataclass(frozen=True)
class CuSparseLt:
    """cuSPARSELt: weights are packed by torch, products run through a plan that is kept."""

    name: str = "cusparselt"

    def unsupported(self, weight: Tensor) -> str | None:
        rows, channels = weight.shape
        if reason := unsupported_dtype(weight.dtype, DTYPES_16 + DTYPES_8):
            return reason
        if reason := unsupported_card(weight):
            return reason
        if not torch.backends.cusparselt.is_available():
            return "this build of torch has no cuSPARSELt"
        multiple = 16 if weight.dtype in DTYPES_16 else 32
        if rows % multiple or channels % multiple:
            return f"{rows} x {channels} is no multiple of {multiple}"
        return None

    def prepare(self, weight: Tensor) -> Tensor:
        return torch._cslt_compress(weight)

    def unpack(
        self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        # The library's layout is its own. A product by 1 and zeros is exact.
        rows, channels = shape
        weight = packed.new_empty(shape, dtype=dtype)
        for start in range(0, channels, _UNPACKED):
            part = min(_UNPACKED, channels - start)
            ones = torch.zeros(part, channels, device=packed.device)
            ones.diagonal(start).fill_(1)
            product = self.run(packed, ones.to(dtype), rows, _DEFAULT)
            weight[:, start : start + part] = product.t().to(dtype)
        return weight

    def candidates(self, packed: Tensor, x: Tensor, rows: int) -> list[Settings]:
        tokens, channels = x.shape
        if (
            x.dtype not in _SEARCHED
            or rows % _SAFE_MULTIPLE
            or channels % _SAFE_MULTIPLE
        ):
            return [_DEFAULT]
        try:
            return list(dict.fromkeys((_search(packed, x), _DEFAULT)))
        except RuntimeError as error:
            logger.info(
                "cuSPARSELt's search failed for %d tokens by %d x %d, %s; its default "
                "algorithm is used: %s",
                *(tokens, rows, channels, x.dtype, error),
            )
            return [_DEFAULT]

    def takes(self, weight: Tensor, tokens: int, settings: Settings) -> bool:
        return len(settings) == len(_DEFAULT)

    def run(self, packed: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        algorithm, split_k, split_k_mode = settings
        tokens, out_dtype = _aligned(x), output_dtype(x.dtype)
        count, channels = tokens.shape
        shape = (x.get_device(), rows, channels, count)
        plan = plan_of(ProductSize(*shape, x.dtype, out_dtype, *settings))
        if plan is not None:
            out = multiply(plan, packed, tokens)
        else:
            out = torch._cslt_sparse_mm(
                packed,
                tokens.t(),
                out_dtype=_torch_out_dtype(x.dtype),
                transpose_result=True,
                alg_id=algorithm,
                split_k=split_k,
                split_k_mode=split_k_mode,
            )
        return out if tokens is x else out[: x.shape[0]]


def _aligned(x: Tensor) -> Tensor:
    """Make the tokens contiguous, and pad them to the library's alignment."""
    return padded(x, 8 if x.dtype in DTYPES_16 else 16).contiguous()


def _torch_out_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """Return torch's ``out_dtype``: it must be None for weights of 16 bits."""
    return None if dtype in DTYPES_16 else output_dtype(dtype)


def _search(packed: Tensor, x: Tensor) -> Settings:
    """Let the library time its algorithms, and return the fastest settings."""
    out_dtype = _torch_out_dtype(x.dtype)
    arguments = (packed, _aligned(x).t(), None, None, out_dtype, True)
    bindings = getattr(torch._C, "_cusparselt", None)
    if bindings is not None and hasattr(bindings, "mm_search"):
        algorithm, split_k, split_k_mode, _ = bindings.mm_search(*arguments)
        return int(algorithm), int(split_k), int(split_k_mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return int(torch._cslt_sparse_mm_search(*arguments)), 1, -1
