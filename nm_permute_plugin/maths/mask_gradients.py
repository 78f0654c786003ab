# SPDX-License-Identifier: Apache-2.0
"""
What the gradient of an N:M mask says about scores.

``G`` is the gradient of the loss with respect to a mask of zeros and ones: to first order
a weight that enters the mask changes the loss by its ``G``, and one that leaves it by
``-G``. An N:M mask changes by pairs, because whatever enters a group pushes the weight at
the boundary out. So a score that grows changes the loss by ``(G - G_runner_up) dp``, where
``p`` is the probability that a soft choice gives the weight.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nm_permute_plugin.maths.masks import at_rank, group_ranks
from nm_permute_plugin.maths.pattern import NMPattern

SOFTNESS = 0.3
"""Temperature of the soft choice in units of the log-score: how far ahead of its
runner-up a weight still has a gradient."""


def score_gradient(
    score: Float[Tensor, "rows groups m"],
    grad: Float[Tensor, "rows groups m"],
    pattern: NMPattern,
    softness: float = SOFTNESS,
) -> Float[Tensor, "rows groups m"]:
    """
    The gradient of the loss by every log-score, as if the hard choice were a little soft.

    The runner-up of a kept weight is the best that was dropped, that of a dropped
    weight the worst that was kept. The weight is kept with probability ``sigmoid(lead /
    softness)``, the lead being the difference of the two log-scores; otherwise its
    runner-up is kept.

    :param score: of the weights, group by group
    :param grad: of the loss with respect to the mask
    :param softness: see ``SOFTNESS``
    """
    logs = score.clamp_min(torch.finfo(score.dtype).tiny).log()
    grads = grad.float()
    ranks = group_ranks(logs)
    kept = ranks < pattern.n

    def runner_up(values: Tensor) -> Tensor:
        best_dropped = at_rank(values, ranks, pattern.n)[..., None]
        worst_kept = at_rank(values, ranks, pattern.n - 1)[..., None]
        return torch.where(kept, best_dropped, worst_kept)

    chance = torch.sigmoid((logs - runner_up(logs)) / softness)
    return (grads - runner_up(grads)) * chance * (1 - chance) / softness
