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

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.ranks import at_rank, by_place, descending, group_ranks

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
    grads = grad.to(logs.dtype)
    ranks = group_ranks(logs)
    logs_at = descending(logs)
    last_log, next_log = logs_at[pattern.n - 1], logs_at[pattern.n]
    last_grad, next_grad = (
        at_rank(grads, ranks, r) for r in (pattern.n - 1, pattern.n)
    )
    found = []
    columns = (by_place(x) for x in (logs, grads, ranks.to(logs.dtype)))
    for log, own, rank in zip(*columns, strict=True):
        kept = rank.lt_(pattern.n)  # 1 or 0: lerp chooses, faster than torch.where
        lead = log - torch.lerp(last_log, next_log, kept)
        chance = lead.div_(softness).sigmoid_()
        other = torch.lerp(last_grad, next_grad, kept)
        found.append((own - other).mul_(chance).mul_(1 - chance).div_(softness))
    return torch.stack(found).movedim(0, -1)
