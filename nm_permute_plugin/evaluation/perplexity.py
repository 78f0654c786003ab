# SPDX-License-Identifier: Apache-2.0
"""Measure the token perplexity of a checkpoint, read back from disk."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from nm_permute_plugin.evaluation.pretrained import load_checkpoint
from nm_permute_plugin.evaluation.text import Window
from nm_permute_plugin.pruning.running.masked import evaluating

MOST_NATS = 700.0
"""A larger mean negative log-likelihood, in nats, overflows the exponential."""


def perplexity(
    model: nn.Module, windows: Sequence[Window], batch_size: int = 1
) -> float:
    """
    Return ``exp`` of the mean negative log-likelihood of all windows.

    Every token of a window but the first is predicted from those before it, by the model
    without dropout. Figures of different lengths, or tokenizers, do not compare.

    :param windows: of tokens, as ``TextTokenizer.windows`` cuts them; those of a batch are
        padded on the right, which no causal model sees
    :raises ValueError: if nothing is predicted, or if the likelihood is not finite
    """
    device = next(model.parameters()).device
    predicted = count_predicted(windows)
    total = 0.0
    starts = range(0, len(windows), batch_size)
    with torch.no_grad(), evaluating(model):
        for start in tqdm(starts, desc="Perplexity", leave=False):
            batch = windows[start : start + batch_size]
            ids = pad_sequence(list(batch), batch_first=True).to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            for window, row, targets in zip(batch, logits, ids, strict=True):
                row, targets = row[: len(window) - 1], targets[1 : len(window)]
                total += float(F.cross_entropy(row.float(), targets, reduction="sum"))
    return exp_of_mean(total, predicted)


def count_predicted(windows: Sequence[Window]) -> int:
    """
    How many tokens are predicted: all of a window but the first.

    :raises ValueError: if there are none
    """
    predicted = sum(len(window) - 1 for window in windows)
    if predicted < 1:
        raise ValueError("no window has two tokens, so that nothing is predicted")
    return predicted


def exp_of_mean(total: float, predicted: int) -> float:
    """
    The perplexity of tokens.

    :param total: the sum of their negative log-likelihoods, in nats
    :raises ValueError: if it is not finite, or too large for a working model
    """
    mean = total / predicted
    if not mean < MOST_NATS:
        raise ValueError(f"the mean negative log-likelihood is {mean}: broken weights")
    return math.exp(mean)


def evaluate_checkpoint(
    checkpoint: str | Path,
    windows: Sequence[Window],
    device: str,
    batch_size: int = 1,
) -> float:
    """
    Measure the perplexity of a checkpoint as it is read back from disk.

    :raises ValueError: as ``perplexity``
    """
    model = load_checkpoint(checkpoint, device)
    try:
        return perplexity(model, windows, batch_size)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
