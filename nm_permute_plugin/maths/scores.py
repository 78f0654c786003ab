# SPDX-License-Identifier: Apache-2.0
"""Scores of weights: the larger a score, the more its weight deserves to be kept."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

ScoreName = Literal["wanda", "ria", "magnitude"]


def magnitude(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """
    ``|W_ij|``, in float32.

    >>> magnitude(torch.tensor([[-2.0, 1.0]]))
    tensor([[2., 1.]])
    """
    return weight.float().abs()


def wanda(
    weight: Float[Tensor, "out in"], input_norm: Float[Tensor, " in"]
) -> Float[Tensor, "out in"]:
    """
    ``|W_ij| * ||x_j||_2`` (Wanda, https://arxiv.org/abs/2306.11695, eq. 1), in float32.

    :param input_norm: L2 norm of each input channel over the calibration tokens

    >>> wanda(torch.tensor([[-2.0, 1.0]]), torch.tensor([1.0, 3.0]))
    tensor([[2., 3.]])
    """
    return weight.float().abs() * input_norm.float()


def ria(
    weight: Float[Tensor, "out in"],
    input_norm: Float[Tensor, " in"],
    exponent: float = 0.5,
) -> Float[Tensor, "out in"]:
    """
    Relative importance and activations (Zhang et al., ICLR 2024, "Plug-and-Play"):

    ``(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||x_j||_2 ** a``, in float32.
    A row or column of zeros scores zero.

    :param input_norm: L2 norm of each input channel over the calibration tokens
    :param exponent: the paper's ``a``

    >>> ria(torch.tensor([[1.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 4.0]))
    tensor([[1.0000, 1.5000],
            [0.7500, 3.0000]])
    """
    size = weight.float().abs()
    tiny = torch.finfo(size.dtype).tiny
    of_column = size / size.sum(dim=0, keepdim=True).clamp_min(tiny)
    of_row = size / size.sum(dim=1, keepdim=True).clamp_min(tiny)
    return (of_column + of_row) * input_norm.float() ** exponent


def score_weight(
    name: ScoreName,
    weight: Float[Tensor, "out in"],
    input_norm: Float[Tensor, " in"] | None,
) -> Float[Tensor, "out in"]:
    """
    The score called ``name`` in a recipe.

    :param input_norm: needed by ``wanda`` and ``ria``
    :raises ValueError: if the score is unknown, or needs an ``input_norm`` and has none
    """
    if name == "magnitude":
        return magnitude(weight)
    if name not in ("wanda", "ria"):
        raise ValueError(f"score {name!r} is unknown; use wanda, ria or magnitude")
    if input_norm is None:
        raise ValueError(
            f"score {name!r} needs the input norms of calibration text; give the run "
            "a dataset, or use score: magnitude"
        )
    return (wanda if name == "wanda" else ria)(weight, input_norm)
