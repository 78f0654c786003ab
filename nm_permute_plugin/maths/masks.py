# SPDX-License-Identifier: Apache-2.0
"""N:M masks: which weights of every group of M input channels are kept."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.ranks import group_ranks


def nm_mask(
    score: Float[Tensor, "out in"], pattern: NMPattern
) -> Bool[Tensor, "out in"]:
    """
    Keep the ``n`` best-scored weights of every ``m`` consecutive input channels.

    Ties keep the lower channel, on every device: scores of quantized weights tie often.

    :param score: importance of each weight, larger is kept; must be finite
    :param pattern: the N:M pattern; ``m`` must divide ``in``
    :return: True where the weight is kept
    :raises ValueError: if ``m`` does not divide ``in``, or a score is not finite

    >>> nm_mask(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), NMPattern(2, 4))
    tensor([[ True, False,  True, False]])
    """
    _check_width(score.shape[-1], pattern)
    if not bool(torch.isfinite(score).all()):
        row, channel = (~torch.isfinite(score)).nonzero()[0].tolist()
        raise ValueError(
            f"the score of row {row}, input channel {channel} is "
            f"{score[row, channel].item()}; scores must be finite. Look for NaN or "
            "infinity in the weights and in the calibration activations."
        )
    groups = rearrange(score, "out (group m) -> out group m", m=pattern.m)
    return rearrange(group_ranks(groups) < pattern.n, "out group m -> out (group m)")


def retained_score(score: Float[Tensor, "out in"], pattern: NMPattern) -> float:
    """
    The sum of the scores that the N:M mask keeps, accumulated in float64.

    >>> retained_score(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), NMPattern(2, 4))
    7.0
    """
    return float(score.masked_fill(~nm_mask(score, pattern), 0).double().sum())


def _check_width(width: int, pattern: NMPattern) -> None:
    if width % pattern.m:
        raise ValueError(
            f"M={pattern.m} of the pattern {pattern} does not divide the {width} input "
            "channels. Use another mask_structure, or put the layer under `ignore`."
        )
