# SPDX-License-Identifier: Apache-2.0
"""What a pruned model is judged by: the text itself, and the dense model's outputs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nm_permute_plugin.training.divergence import cross_entropy, divergence
from nm_permute_plugin.training.statistics import Batch, token_mask


@dataclass(frozen=True)
class LossWeights:
    """
    Weights of the parts of the loss; 0 leaves a part out.

    :param divergence: KL divergence of the next-token distribution from the dense one's
    :param cross_entropy: of the next token of the text
    :param hidden: Smooth-L1 distance of every layer's hidden states from the dense ones
        (https://arxiv.org/abs/2601.22980, eq. 7), summed over the layers
    :param cosine: one minus the cosine similarity of the final hidden states
        (https://arxiv.org/abs/2510.10136, eq. 10)
    """

    divergence: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0
    cosine: float = 0.0

    @property
    def needs_hidden(self) -> bool:
        return self.hidden > 0 or self.cosine > 0


@dataclass(frozen=True)
class Outputs:
    """What one forward pass leaves for the loss."""

    logits: Float[Tensor, "rows tokens vocabulary"]
    hidden: tuple[Float[Tensor, "rows tokens width"], ...] = ()


def run(model: nn.Module, batch: Batch, weights: LossWeights) -> Outputs:
    """One forward pass over a batch that is on the model's device."""
    out = model(**batch, use_cache=False, output_hidden_states=weights.needs_hidden)
    return Outputs(out.logits, tuple(out.hidden_states) if weights.needs_hidden else ())


def loss(
    pruned: Outputs, dense: Outputs, batch: Mapping[str, Tensor], weights: LossWeights
) -> Float[Tensor, ""]:
    """The weighted sum of the parts, each a mean over the tokens that count."""
    mask = token_mask(batch)
    total = torch.zeros((), device=pruned.logits.device)
    if weights.divergence:
        total = total + weights.divergence * divergence(
            pruned.logits, dense.logits, mask
        )
    if weights.cross_entropy:
        total = total + weights.cross_entropy * cross_entropy(
            pruned.logits, batch["input_ids"], mask
        )
    if weights.hidden:
        for ours, theirs in zip(pruned.hidden, dense.hidden, strict=True):
            total = total + weights.hidden * F.smooth_l1_loss(ours[mask], theirs[mask])
    if weights.cosine:
        ours, theirs = pruned.hidden[-1][mask], dense.hidden[-1][mask]
        similarity = F.cosine_similarity(ours.float(), theirs.float(), dim=-1)
        total = total + weights.cosine * (1 - similarity.mean())
    return total
