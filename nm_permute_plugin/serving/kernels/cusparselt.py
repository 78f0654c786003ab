# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's library for 2:4 products, with the algorithm searched for each size."""

import logging
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.kernel import (
    NARROW,
    WIDE,
    Product,
    Settings,
    padded,
)
from nm_permute_plugin.serving.kernels.scaling import scaled

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

# Settings: algorithm, parts of the channels, how these are added up, and whether the
# product itself takes the weight's scales.
_DEFAULT = (0, 1, -1)

# The search tries kernels that small odd shapes crash ("illegal instruction" at 96 x 384
# in float16, version 0.8), and a crash ends the process.
_SAFE = 128


@dataclass(frozen=True)
class CuSparseLt:
    """cuSPARSELt through torch; 8-bit products take the weight's scales along."""

    name: str = "cusparselt"

    def refusal(self, weight: Tensor) -> str | None:
        rows, channels = weight.shape
        if weight.dtype not in WIDE + NARROW:
            return f"{weight.dtype} has no kernel"
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

    def candidates(self, form: Tensor, product: Product) -> list[Settings]:
        found: list[Settings] = []
        for fused in (1, 0) if product.scale_w is not None else (0,):
            try:
                if product.out_features % _SAFE == product.x.shape[1] % _SAFE == 0:
                    found.append((*_search(form, product, fused), fused))
                found.append((*_DEFAULT, fused))
            except RuntimeError as error:  # not every version scales every dtype
                logger.info("no search of cuSPARSELt's algorithms: %s", error)
        return list(dict.fromkeys(found))

    def run(self, form: Tensor, product: Product, settings: Settings) -> Tensor:
        algorithm, parts, how, fused = settings
        raw = torch._cslt_sparse_mm(
            form,
            _tokens(product.x).t(),
            alpha=_alpha(product, fused),
            out_dtype=_raw_dtype(product),
            transpose_result=True,
            alg_id=algorithm,
            split_k=parts,
            split_k_mode=how,
        )[: len(product.x)]
        if product.scale_x is None:
            return raw
        scale_w = None if fused else product.scale_w
        return scaled(raw, product.scale_x, scale_w, product.bias, product.out_dtype)


def _tokens(x: Tensor) -> Tensor:
    """The tokens, contiguous, as many as the library's alignment asks for."""
    return padded(x, 8 if x.dtype in WIDE else 16).contiguous()


def _raw_dtype(product: Product) -> torch.dtype | None:
    """Scaled sums by the weight's scale alone may be too large for float16."""
    return None if product.scale_x is None else torch.bfloat16


def _alpha(product: Product, fused: int) -> Tensor | None:
    """The weight's scales, a number a row: the library multiplies by them for free."""
    if not fused or product.scale_w is None:
        return None
    return product.scale_w.reshape(-1).expand(product.out_features).contiguous()


def _search(form: Tensor, product: Product, fused: int) -> Settings:
    """The library's own choice after trying its algorithms."""
    x, alpha = _tokens(product.x).t(), _alpha(product, fused)
    arguments = (form, x, None, alpha, _raw_dtype(product), True)
    bindings = getattr(torch._C, "_cusparselt", None)
    if bindings is not None and hasattr(bindings, "mm_search"):
        algorithm, parts, how, _ = bindings.mm_search(*arguments)
        return int(algorithm), int(parts), int(how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return int(torch._cslt_sparse_mm_search(*arguments)), 1, -1
