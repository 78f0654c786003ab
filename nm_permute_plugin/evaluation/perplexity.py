# SPDX-License-Identifier: Apache-2.0
"""Measure the token perplexity of a checkpoint, read back from disk."""

import math
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nm_permute_plugin.evaluation.pretrained import load_checkpoint, tokenizer_of

MOST_NATS = 700.0
"""A larger mean negative log-likelihood, in nats, overflows the exponential."""


def perplexity(
    model: nn.Module,
    tokens: Int[Tensor, " tokens"],
    sequence_length: int = 2048,
    batch_size: int = 1,
) -> float:
    """
    Return ``exp`` of the mean negative log-likelihood of one token stream.

    The stream is cut into windows of ``sequence_length`` that do not overlap; every token
    of a window but the first is predicted from those before it. The rest that fills no
    window is left out. Figures of different lengths, or tokenizers, do not compare.

    :raises ValueError: if the stream fills no window, if a window predicts nothing, or if
        the likelihood is not finite
    """
    if sequence_length < 2:
        raise ValueError(f"a window needs at least 2 tokens, not {sequence_length}")
    count = len(tokens) // sequence_length
    if count == 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens, less than one window of "
            f"{sequence_length}: give more text or a smaller --sequence-length"
        )
    windows = tokens[: count * sequence_length].view(count, sequence_length)
    device = next(model.parameters()).device
    total = 0.0
    with torch.no_grad():
        for batch in tqdm(windows.split(batch_size), desc="Perplexity", leave=False):
            batch = batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, targets in zip(logits[:, :-1], batch[:, 1:], strict=True):
                total += float(F.cross_entropy(row.float(), targets, reduction="sum"))
    mean = total / (count * (sequence_length - 1))
    if not mean < MOST_NATS:
        raise ValueError(f"the mean negative log-likelihood is {mean}: broken weights")
    return math.exp(mean)


def tokenize(checkpoint: str | Path, text: str) -> Int[Tensor, " tokens"]:
    """Turn text into one stream of the checkpoint's tokens, without special tokens."""
    tokenizer = tokenizer_of(checkpoint)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def evaluate_checkpoint(
    checkpoint: str | Path,
    tokens: Int[Tensor, " tokens"],
    sequence_length: int,
    device: str,
    batch_size: int = 1,
) -> float:
    """Measure the perplexity of a checkpoint as it is read back from disk."""
    model = load_checkpoint(checkpoint, device)
    return perplexity(model, tokens, sequence_length, batch_size)
