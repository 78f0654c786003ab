# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's library for 2:4 products, with the algorithm searched for each size."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernels.cusparselt_plan import Size, multiply, plan_of
from nm_permute_plugin.serving.kernels.kernel import (
    NARROW,
    WIDE,
    Product,
    Settings,
    padded,
    unknown,
)
from nm_permute_plugin.serving.kernels.scaling import scaled

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

# Settings: algorithm, parts of the channels, how these are added up, whether the product
# itself takes the weight's scales, and how many tokens go at a time (0: all).
_DEFAULT = (0, 1, -1)

# On an H100 (torch 2.11) float8 refuses a vector of scales ("not supported"), and the
# search fails in float16, or crashes.
_FUSING = (torch.int8,)
_SEARCHED = (torch.bfloat16, *NARROW)

# The search tries kernels that small odd shapes crash ("illegal instruction" at 96 x 384,
# version 0.8), and a crash ends the process.
_SAFE = 128

PART_BYTES = 32 << 20
"""A part's sums, at most about: they are in the L2 cache still when they are scaled."""


@dataclass(frozen=True)
class CuSparseLt:
    """cuSPARSELt through torch; products of int8 may take the weight's scales along."""

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

    def candidates(self, form: Tensor, product: Product) -> list[Settings]:
        choices = (1, 0) if product.x.dtype in _FUSING else (0,)
        found: list[Settings] = [
            (*algorithm, fused, 0)
            for fused in choices
            for algorithm in _algorithms(form, product, fused)
        ]
        if few := _tokens_at_a_time(product):
            part = product.split(few)[0]
            found.append((*_algorithms(form, part, choices[0])[0], choices[0], few))
        return found

    def run(self, form: Tensor, product: Product, settings: Settings) -> Tensor:
        few = settings[-1]
        if not few:
            return _run(form, product, settings)
        size = (len(product.x), product.out_features)
        out = product.x.new_empty(size, dtype=product.out_dtype)
        for part, into in zip(product.split(few), out.split(few), strict=True):
            _run(form, part, settings, into)
        return out


def _run(
    form: Tensor, product: Product, settings: Settings, out: Tensor | None = None
) -> Tensor:
    """All tokens at once; ``out`` is written to if there is something to scale."""
    *algorithm, fused, _ = settings
    raw = _product(form, product, algorithm, fused)[: len(product.x)]
    if product.scale_x is None:
        return raw
    scale_w = None if fused else product.scale_w
    return scaled(raw, product.scale_x, scale_w, product.bias, product.out_dtype, out)


def _product(
    form: Tensor, product: Product, algorithm: Sequence[int], fused: int
) -> Tensor:
    """The product alone, padded; by a plan that is kept, where one can be."""
    x, alpha = _tokens(product.x), _alpha(product, fused)
    number, parts, how = algorithm
    out_dtype = _raw_dtype(product) or x.dtype
    size = (
        x.get_device(),
        product.out_features,
        x.shape[1],
        len(x),
        x.dtype,
        out_dtype,
    )
    plan = plan_of(Size(*size, number, parts, how, alpha is not None))
    if plan is not None:
        return multiply(plan, form, x, alpha)
    return torch._cslt_sparse_mm(
        form,
        x.t(),
        alpha=alpha,
        out_dtype=_raw_dtype(product),
        transpose_result=True,
        alg_id=number,
        split_k=parts,
        split_k_mode=how,
    )


def _tokens(x: Tensor) -> Tensor:
    """The tokens, contiguous, as many as the library's alignment asks for."""
    return padded(x, 8 if x.dtype in WIDE else 16).contiguous()


def _tokens_at_a_time(product: Product) -> int:
    """How many tokens go at a time where all at once make sums too large; 0: all."""
    tokens = len(product.x)
    parts = -(-2 * tokens * product.out_features // PART_BYTES)  # sums are bfloat16
    if product.scale_x is None or tokens <= 256 or parts < 2:
        return 0
    return -(-tokens // (128 * parts)) * 128


def _raw_dtype(product: Product) -> torch.dtype | None:
    """Scaled sums by the weight's scale alone may be too large for float16."""
    return None if product.scale_x is None else torch.bfloat16


def _alpha(product: Product, fused: int) -> Tensor | None:
    """The weight's scales, a number a row: the library multiplies by them for free."""
    if not fused or product.scale_w is None:
        return None
    return product.scale_w.reshape(-1).expand(product.out_features).contiguous()


def _algorithms(form: Tensor, product: Product, fused: int) -> list[Settings]:
    """The library's own choice after trying its algorithms, if any, and its default."""
    tokens, channels = product.x.shape
    rows, dtype = product.out_features, product.x.dtype
    if dtype not in _SEARCHED or rows % _SAFE or channels % _SAFE:
        return [_DEFAULT]
    try:
        return list(dict.fromkeys((_search(form, product, fused), _DEFAULT)))
    except RuntimeError as error:
        logger.info(
            "cuSPARSELt's search failed for %d tokens by %d x %d, %s%s, which leaves its "
            "default algorithm: %s",
            *(tokens, rows, channels, dtype, ", with scales" if fused else "", error),
        )
        return [_DEFAULT]


def _search(form: Tensor, product: Product, fused: int) -> Settings:
    x, alpha = _tokens(product.x).t(), _alpha(product, fused)
    arguments = (form, x, None, alpha, _raw_dtype(product), True)
    bindings = getattr(torch._C, "_cusparselt", None)
    if bindings is not None and hasattr(bindings, "mm_search"):
        algorithm, parts, how, _ = bindings.mm_search(*arguments)
        return int(algorithm), int(parts), int(how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return int(torch._cslt_sparse_mm_search(*arguments)), 1, -1
