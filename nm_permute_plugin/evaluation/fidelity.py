# SPDX-License-Identifier: Apache-2.0
"""Measure how near a checkpoint's predictions are to the dense model's, on text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from loguru import logger
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from nm_permute_plugin.evaluation.perplexity import count_predicted, exp_of_mean
from nm_permute_plugin.evaluation.pretrained import config_of, load_checkpoint
from nm_permute_plugin.evaluation.text import Window
from nm_permute_plugin.maths.kl import ELEMENTS
from nm_permute_plugin.pruning.running.masked import evaluating

KEPT = 1 << 32
"""Logits that are kept in the host's memory while two models take turns."""


@dataclass(frozen=True)
class Fidelity:
    """
    How a model predicts text, and how near that is to the dense model.

    :param perplexity: the model's own
    :param dense: the dense model's perplexity on the same tokens
    :param divergence: mean KL divergence from the dense model, nats a token
    :param agreement: share of the tokens whose most likely next token is the dense model's
    :param flips: share of the tokens where exactly one of the two puts the text's next
        token first
    :param tokens: how many tokens were predicted
    """

    perplexity: float
    dense: float
    divergence: float
    agreement: float
    flips: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL divergence {self.divergence:.4f} nats a token, top-1 agreement "
            f"{self.agreement:.2%}, flips {self.flips:.2%}"
        )


def fidelity(
    ours: nn.Module,
    dense: nn.Module,
    windows: Sequence[Window],
    batch_size: int = 1,
    turn: int | None = None,
) -> Fidelity:
    """
    Compare the next-token distributions of two models in one pass over the windows.

    Beside the logits of a batch, no more than a few tokens are held in float32.

    :param dense: stands on the device
    :param windows: of tokens, as ``perplexity`` takes them
    :param turn: so many windows are read by one model, then by the other, and only one of
        the two is on the device; None where both are
    :raises ValueError: as ``perplexity``, for either model, and if the two do not have
        the same vocabulary
    """
    device = next(dense.parameters()).device
    home = device if turn is None else torch.device("cpu")
    predicted = count_predicted(windows)
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    starts = range(0, len(windows), turn or batch_size)
    with torch.no_grad(), evaluating(ours), evaluating(dense):
        for start in tqdm(starts, desc="Fidelity", leave=False):
            taken = windows[start : start + (turn or batch_size)]
            batches = [
                taken[i : i + batch_size] for i in range(0, len(taken), batch_size)
            ]
            if turn is not None:
                _change_places(ours, dense, device)
            kept = [_logits(dense, batch, device).to(home) for batch in batches]
            if turn is not None:
                _change_places(dense, ours, device)
            for batch, theirs in zip(batches, kept, strict=True):
                mine = _logits(ours, batch, device)
                _refuse_widths(mine.shape[-1], theirs.shape[-1])
                for window, row, other in zip(batch, mine, theirs, strict=True):
                    last, targets = len(window) - 1, window[1:].to(device)
                    sums += _sums(row[:last], other[:last].to(device), targets)
    nll, dense_nll, divergence, same, flipped = sums.tolist()
    return Fidelity(
        perplexity=exp_of_mean(nll, predicted),
        dense=exp_of_mean(dense_nll, predicted),
        divergence=divergence / predicted,
        agreement=same / predicted,
        flips=flipped / predicted,
        tokens=predicted,
    )


def compare_checkpoints(
    checkpoint: str | Path,
    dense: str | Path,
    windows: Sequence[Window],
    device: str,
    batch_size: int = 1,
) -> Fidelity:
    """
    Compare a checkpoint, as it is read back from disk, with the dense model.

    Both are held on the device; where that has no room for two, they take turns there.

    :raises ValueError: as ``fidelity``
    """
    vocabulary = _vocabulary(checkpoint)
    _refuse_widths(vocabulary, _vocabulary(dense))
    ours, turn = load_checkpoint(checkpoint, device), None
    try:
        theirs = load_checkpoint(dense, device)
    except torch.OutOfMemoryError:
        longest = max(map(len, windows))
        turn = max(batch_size, KEPT // (longest * vocabulary))
        logger.warning(
            f"{device} has no room for both models: they take turns of {turn} windows"
        )
        ours.to("cpu")
        theirs = load_checkpoint(dense, device)
    return fidelity(ours, theirs, windows, batch_size, turn)


def refuse_other_tokens(
    windows: Sequence[Window],
    theirs: Sequence[Window],
    checkpoint: str | Path,
    other: str | Path,
) -> None:
    """
    See that two tokenizers cut a text alike, so that what is measured of both compares.

    :raises ValueError: if they do not
    """
    alike = len(windows) == len(theirs) and all(
        torch.equal(mine, other) for mine, other in zip(windows, theirs, strict=True)
    )
    if not alike:
        raise ValueError(
            f"the tokenizers of {checkpoint} and {other} turn the text into different "
            "tokens, so that their figures do not compare: give the model that the "
            "checkpoint was made from"
        )


def _vocabulary(folder: str | Path) -> int:
    return int(config_of(folder).get_text_config().vocab_size)


def _change_places(leaving: nn.Module, coming: nn.Module, device: torch.device) -> None:
    leaving.to("cpu")
    coming.to(device)


def _logits(model: nn.Module, batch: Sequence[Window], device: torch.device) -> Tensor:
    ids = pad_sequence(list(batch), batch_first=True).to(device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _refuse_widths(ours: int, dense: int) -> None:
    if ours != dense:
        raise ValueError(
            f"the checkpoint predicts one of {ours} tokens and the dense model one of "
            f"{dense}: their predictions do not compare; give the model that the "
            "checkpoint was made from"
        )


def _sums(
    ours: Float[Tensor, "tokens vocabulary"],
    dense: Float[Tensor, "tokens vocabulary"],
    targets: Int[Tensor, " tokens"],
) -> Float[Tensor, " 5"]:
    """
    Both negative log-likelihoods, the KL divergence, how often both put one token first,
    and how often exactly one of them puts the target first; each summed over the tokens.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=ours.device)
    for part in _parts(*ours.shape):
        mine, theirs = (_wide(logits[part]).log_softmax(-1) for logits in (ours, dense))
        target = targets[part]
        first, dense_first = mine.argmax(-1), theirs.argmax(-1)
        values = [
            -mine.gather(-1, target[:, None]),
            -theirs.gather(-1, target[:, None]),
            theirs.exp().mul_(theirs.sub(mine)).sum(-1),
            first == dense_first,
            (first == target) != (dense_first == target),
        ]
        sums += torch.stack([value.sum(dtype=torch.float64) for value in values])
    return sums


def _parts(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Tokens whose logits may be held in float32 at a time."""
    size = max(1, ELEMENTS // vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))


def _wide(logits: Tensor) -> Tensor:
    """At least float32, which 16 bits are too narrow to be summed in."""
    return logits if logits.dtype == torch.float64 else logits.float()
