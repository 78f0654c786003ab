# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's library for 2:4 products, with the algorithm searched for each size."""

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

_DEFAULT: Settings = (
    0,
    1,
    -1,
)  # algorithm, parts of the channels, how they are added up


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
        x = _tokens(product.x)
        alpha, dtype = _alpha(product), _raw_dtype(product)
        return list(dict.fromkeys((_search(form, x, alpha, dtype), _DEFAULT)))

    def run(self, form: Tensor, product: Product, settings: Settings) -> Tensor:
        algorithm, parts, how = settings
        raw = torch._cslt_sparse_mm(
            form,
            _tokens(product.x).t(),
            alpha=_alpha(product),
            out_dtype=_raw_dtype(product),
            transpose_result=True,
            alg_id=algorithm,
            split_k=parts,
            split_k_mode=how,
        )[: len(product.x)]
        if product.scale_x is None:
            return raw
        return scaled(raw, product.scale_x, None, product.bias, product.out_dtype)


def _tokens(x: Tensor) -> Tensor:
    """The tokens, contiguous, as many as the library's alignment asks for."""
    return padded(x, 8 if x.dtype in WIDE else 16).contiguous()


def _raw_dtype(product: Product) -> torch.dtype | None:
    """Scaled sums by the weight's scale alone may be too large for float16."""
    return None if product.scale_x is None else torch.bfloat16


def _alpha(product: Product) -> Tensor | None:
    """The weight's scales, a number a row: the library multiplies by them for free."""
    if product.scale_w is None:
        return None
    return product.scale_w.reshape(-1).expand(product.out_features).contiguous()


def _search(
    form: Tensor, x: Tensor, alpha: Tensor | None, dtype: torch.dtype | None
) -> Settings:
    """The library's own choice after trying its algorithms."""
    arguments = (form, x.t(), None, alpha, dtype, True)
    bindings = getattr(torch._C, "_cusparselt", None)
    if bindings is not None and hasattr(bindings, "mm_search"):
        algorithm, parts, how, _ = bindings.mm_search(*arguments)
        return int(algorithm), int(parts), int(how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (int(torch._cslt_sparse_mm_search(*arguments)), 1, -1)
