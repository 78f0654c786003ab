# SPDX-License-Identifier: Apache-2.0
"""
The loss of a pruned model: its distance from the dense model's outputs, or from the text.

What the model gives back decides which output is compared:

- a language model: the divergence of its predictions of the next token
- a classifier: the divergence of its predictions of the class; labels are not needed
- a model without a head (BERT, ViT, DINOv2 as encoders): the relative squared error of
  its final hidden states
- a head with one label (reward and regression models): the relative squared error
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nm_permute_plugin.maths.kl import cross_entropy, divergence
from nm_permute_plugin.pruning.data import (
    Batch,
    Counted,
    counted_rows,
    forward,
    token_mask,
)
from nm_permute_plugin.pruning.settings import LossSettings


@dataclass(frozen=True)
class Outputs:
    """
    What one forward pass leaves for the loss.

    :param logits: of tokens or of classes; final hidden states where there are none
    :param hidden: hidden states of every layer, if asked for
    :param are_values: whether ``logits`` are values to be met, hidden states or the one
        output of a regression, and no distribution
    """

    logits: Float[Tensor, "*_places _values"]
    hidden: tuple[Float[Tensor, "*_places _width"], ...] = ()
    are_values: bool = False


def run(model: nn.Module, batch: Batch, weights: LossSettings) -> Outputs:
    """
    One forward pass over a batch that is on the model's device.

    :raises ValueError: if the model gives back nothing that can be compared
    """
    out = forward(model, batch, output_hidden_states=weights.needs_hidden)
    hidden = getattr(out, "hidden_states", None) if weights.needs_hidden else ()
    if hidden is None:
        raise ValueError(
            f"{type(model).__name__} gives back no hidden states; leave loss.hidden and "
            "loss.cosine at 0"
        )
    values = answer(out)
    has_no_head = getattr(out, "logits", None) is None
    return Outputs(values, tuple(hidden), has_no_head or values.shape[-1] == 1)


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
    Refuse the outputs of a dense model that cannot be compared with anything.

    :raises ValueError: if a number is not finite
    """
    if not bool(outputs.isfinite().all()):
        raise ValueError(
            "the dense model's outputs are not finite; check its weights, and load it in "
            "bfloat16 or float32"
        )


def check_finite(value: float, what: str) -> float:
    """
    The value, such as a training loss, if it is finite.

    :raises ValueError: if it is not finite
    """
    if not math.isfinite(value):
        raise ValueError(
            f"the {what} is {value}; load the model in bfloat16 or float32, check the "
            "calibration data, or lower the rate"
        )
    return value


def loss(
    pruned: Outputs, dense: Outputs, batch: Mapping[str, Tensor], weights: LossSettings
) -> Float[Tensor, ""]:
    """The weighted sum of the loss's parts, each a mean over the tokens that count."""
    mask = token_mask(batch)
    total = torch.zeros((), device=pruned.logits.device)
    # Per-token logits use the token mask; a per-row logit counts if any token of its
    # row does.
    places = mask.any(-1) if mask.dim() == dense.logits.dim() else mask
    if weights.divergence and dense.are_values:
        error = relative_error(pruned.logits, dense.logits, places)
        total = total + weights.divergence * error
    elif weights.divergence:
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
    mask: Counted,
) -> Float[Tensor, ""]:
    """
    ``|ours_t - theirs_t|^2 / |theirs_t|^2``, the mean over the tokens that count.

    It is relative, because the few tokens with huge activations would drown all others. A
    single number may be 0: it is compared with the mean square of all.
    """
    ours, theirs = (counted_rows(x, mask).float() for x in (ours, theirs))
    error, size = (ours - theirs).square().sum(-1), theirs.square().sum(-1)
    if ours.shape[-1] == 1:
        size = size.mean()
    return (error / size).mean()


def _refuse_no_language_model(pruned: Outputs, batch: Mapping[str, Tensor]) -> None:
    if "input_ids" not in batch or pruned.are_values or pruned.logits.dim() < 3:
        raise ValueError(
            "loss.cross_entropy is for language models: this one does not predict the "
            "next token of text; leave it at 0"
        )
