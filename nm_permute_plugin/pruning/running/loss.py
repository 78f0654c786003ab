# SPDX-License-Identifier: Apache-2.0
"""
What a pruned model is judged by: the dense model's outputs, and the text itself.

Which output is compared is decided by what the model gives back:

- a language model: the divergence of its predictions of the next token
- a classifier: the divergence of its predictions of the class; labels are not needed
- a model without a head (BERT, ViT, DINOv2 as encoders): the relative squared error of
  its final hidden states
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nm_permute_plugin.maths.kl import cross_entropy, divergence
from nm_permute_plugin.pruning.statistics import (
    Batch,
    counted_rows,
    forward,
    token_mask,
)


@dataclass(frozen=True)
class LossWeights:
    """
    Weights of the parts of the loss; 0 leaves a part out.

    :param divergence: KL divergence of the next-token (or class) distribution from the
        dense one's; relative squared error of the final hidden states where there is none
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
    """
    What one forward pass leaves for the loss.

    :param logits: of tokens or of classes; final hidden states where there are none
    :param hidden: of every layer, if asked for
    :param is_hidden: whether ``logits`` are hidden states
    """

    logits: Float[Tensor, "*_places _values"]
    hidden: tuple[Float[Tensor, "*_places _width"], ...] = ()
    is_hidden: bool = False


def run(model: nn.Module, batch: Batch, weights: LossWeights) -> Outputs:
    """
    One forward pass over a batch that is on the model's device.

    :raises ValueError: if the model gives back nothing that can be compared
    """
    out = forward(model, batch, output_hidden_states=weights.needs_hidden)
    hidden = getattr(out, "hidden_states", None) if weights.needs_hidden else ()
    if hidden is None:
        raise ValueError(
            f"{type(model).__name__} gives back no hidden states; set hidden_weight and "
            "cosine_weight to 0"
        )
    is_hidden = getattr(out, "logits", None) is None
    return Outputs(answer(out), tuple(hidden), is_hidden)


def answer(out: Any) -> Float[Tensor, "*_places _values"]:
    """
    What a model's output says: logits, or final hidden states where there are none.

    :param out: a transformers model's output
    :raises ValueError: if it has neither
    """
    for name in ("logits", "last_hidden_state"):
        found: Tensor | None = getattr(out, name, None)
        if found is not None:
            return found
    raise ValueError(
        f"a {type(out).__name__} with {', '.join(out)} has neither logits nor "
        "last_hidden_state, so that nothing says how far a pruned model is from the "
        "dense one. Prune the model's towers one by one (CLIPVisionModel, for example)."
    )


def refuse_not_finite(outputs: Float[Tensor, "*_places _values"]) -> None:
    """
    See that a dense model says something.

    :raises ValueError: if a number is not finite
    """
    if not bool(outputs.isfinite().all()):
        raise ValueError(
            "the dense model's outputs are not finite; check its weights, and load it in "
            "bfloat16 or float32"
        )


def check_finite(value: float, what: str) -> float:
    """
    The value, such as a training loss.

    :raises ValueError: if it is not finite
    """
    if not math.isfinite(value):
        raise ValueError(
            f"the {what} is {value}; load the model in bfloat16 or float32, check the "
            "calibration data, or lower the rate"
        )
    return value


def loss(
    pruned: Outputs, dense: Outputs, batch: Mapping[str, Tensor], weights: LossWeights
) -> Float[Tensor, ""]:
    """The weighted sum of the parts, each a mean over the tokens that count."""
    mask = token_mask(batch)
    total = torch.zeros((), device=pruned.logits.device)
    if weights.divergence and dense.is_hidden:
        error = relative_error(pruned.logits, dense.logits, mask)
        total = total + weights.divergence * error
    elif weights.divergence:
        # of tokens, or of classes: those of a row of tokens are one
        places = mask.any(-1) if mask.dim() == dense.logits.dim() else mask
        total = total + weights.divergence * divergence(
            pruned.logits, dense.logits, places
        )
    if weights.cross_entropy:
        _refuse_no_language_model(pruned, batch)
        total = total + weights.cross_entropy * cross_entropy(
            pruned.logits, batch["input_ids"], mask
        )
    if weights.hidden:
        for ours, theirs in zip(pruned.hidden, dense.hidden, strict=True):
            pair = counted_rows(ours, mask), counted_rows(theirs, mask)
            total = total + weights.hidden * F.smooth_l1_loss(*pair)
    if weights.cosine:
        ours, theirs = (counted_rows(o.hidden[-1], mask) for o in (pruned, dense))
        similarity = F.cosine_similarity(ours.float(), theirs.float(), dim=-1)
        total = total + weights.cosine * (1 - similarity.mean())
    return total


def relative_error(
    ours: Float[Tensor, "*_places _width"],
    theirs: Float[Tensor, "*_places _width"],
    mask: Bool[Tensor, "..."],
) -> Float[Tensor, ""]:
    """
    ``|ours_t - theirs_t|^2 / |theirs_t|^2``, the mean over the tokens that count.

    Relative, because the few tokens with huge activations would drown all others.
    """
    ours, theirs = (counted_rows(x, mask).float() for x in (ours, theirs))
    return ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()


def _refuse_no_language_model(pruned: Outputs, batch: Mapping[str, Tensor]) -> None:
    if "input_ids" not in batch or pruned.is_hidden or pruned.logits.dim() < 3:
        raise ValueError(
            "cross_entropy_weight is for language models: this one does not predict the "
            "next token of text; set it to 0"
        )
