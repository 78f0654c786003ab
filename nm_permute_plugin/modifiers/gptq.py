# SPDX-License-Identifier: Apache-2.0
"""Have llm-compressor's GPTQ keep the zeros of sparse weights."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from llmcompressor.modifiers.gptq import base
from llmcompressor.modifiers.gptq.helpers import column_scale_window
from torch import Tensor

LEAST_ZEROS = 0.05
"""The share of zeros from which a weight counts as sparse."""

_ROUNDS_TO_ZERO = 1e30
"""A scale so large that every weight divided by it rounds to 0."""

_MARK = "_keeps_zeros"

Quantized = tuple[Tensor, Tensor, Tensor]
"""Weights [batch, out, in], their losses [batch], and whether they were plainly rounded."""


def keep_zeros() -> None:
    """
    Have ``GPTQModifier`` keep the zeros of weights that are sparse, of every pattern.

    A zero is a weight whose value is known: what GPTQ adds to it, to make up for the errors
    of the channels before, is an error too, and is made up for by the channels behind, as
    SparseGPT (https://arxiv.org/abs/2301.00774) does when it prunes and rounds at once.
    Calling it again changes nothing.
    """
    quantize: Callable[..., Quantized] = base.quantize_weight
    if hasattr(quantize, _MARK):
        return

    @wraps(quantize)
    def keep_if_sparse(weights: Tensor, **given: Any) -> Quantized:
        if float((weights == 0).float().mean()) < LEAST_ZEROS:
            return quantize(weights=weights, **given)
        found = [
            _quantized(quantize, weights[i : i + 1], _part(given, i))
            for i in range(len(weights))
        ]
        parts = [torch.cat(part) for part in zip(*found, strict=True)]
        return parts[0], parts[1], parts[2]

    setattr(keep_if_sparse, _MARK, True)
    base.quantize_weight = keep_if_sparse


def _part(given: dict[str, Any], index: int) -> dict[str, Any]:
    """What belongs to one weight of a batch; a scale for every weight needs much memory."""
    return {
        name: value[index : index + 1] if isinstance(value, Tensor) else value
        for name, value in given.items()
    }


def _quantized(
    quantize: Callable[..., Quantized], weights: Tensor, given: dict[str, Any]
) -> Quantized:
    """One weight, [1, out, in], whose zeros have scales that round everything to 0."""
    args: QuantizationArgs = given["quant_args"]
    dropped = weights == 0
    rows, columns = weights.shape[-2:]
    size = 1 if args.block_structure is None else args.block_structure[1]
    groups = torch.arange(columns, device=weights.device) // (args.group_size or size)
    quantities = (given["scale"], given["zero_point"], given["global_scale"])
    scales, points = column_scale_window(*quantities, groups, args, rows, 0, columns)
    given = given | {
        "scale": scales.float().masked_fill(dropped, _ROUNDS_TO_ZERO),
        "zero_point": given["zero_point"] if points is None else points,
        "global_scale": None,
        "quant_args": args.model_copy(
            update={"strategy": QuantizationStrategy.GROUP, "group_size": 1}
        ),
    }
    quantized, losses, is_fallback = quantize(weights=weights, **given)
    return quantized.masked_fill(dropped, 0), losses, is_fallback
