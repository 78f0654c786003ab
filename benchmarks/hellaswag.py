# SPDX-License-Identifier: Apache-2.0
"""
HellaSwag of a local file, scored without lm-eval, item by item as lm-eval scores it.

Likelihoods are in float32, as lm-eval's are with ``softmax_dtype=float32``; by default it
takes the model's dtype, which turns near ties over in 16 bits.
``tests/benchmarks/test_hellaswag.py`` holds it to lm-eval's own results.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nm_permute_plugin.maths.kl import ELEMENTS
from tasks.hellaswag_file import Item


@dataclass(frozen=True)
class Answers:
    """
    Which items a model answers rightly, in their order.

    :param acc: by the likelihood of the endings
    :param acc_norm: by their likelihood a character
    """

    acc: list[bool]
    acc_norm: list[bool]


@dataclass(frozen=True)
class _Ending:
    """
    An ending behind its context.

    :param place: its number among all endings of all items
    :param tokens: of both
    :param given: how many of the tokens are the context's
    """

    place: int
    tokens: list[int]
    given: int


def answer(
    model: nn.Module, tokenizer: Any, items: Sequence[Item], batch_size: int = 128
) -> Answers:
    """
    Score every ending behind its context, the longest first.

    :param tokenizer: the model's, of transformers
    :param batch_size: endings at a time
    """
    endings = sorted(_endings(tokenizer, items), key=lambda e: -len(e.tokens))
    scores = torch.empty(len(endings), dtype=torch.float64)
    for start in range(0, len(endings), batch_size):
        batch = endings[start : start + batch_size]
        scores[[ending.place for ending in batch]] = log_likelihoods(model, batch)
    acc, acc_norm, first = [], [], 0
    for item in items:
        of = scores[first : first + len(item.choices)]
        lengths = torch.tensor([len(ending) for ending in item.choices])
        acc.append(int(of.argmax()) == item.gold)
        acc_norm.append(int((of / lengths).argmax()) == item.gold)
        first += len(item.choices)
    return Answers(acc, acc_norm)


@torch.no_grad()
def log_likelihoods(model: nn.Module, batch: Sequence[_Ending]) -> Tensor:
    """The log-likelihood of every ending's tokens, given all before them; float64."""
    device = next(model.parameters()).device
    rows = [torch.tensor(ending.tokens) for ending in batch]
    ids = pad_sequence(rows, batch_first=True).to(device)
    logits = model(input_ids=ids, use_cache=False).logits  # padding is on the right
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for row, ending in enumerate(batch):
        wanted[row, ending.given - 1 : len(ending.tokens) - 1] = True
    targets, kept = ids.roll(-1, dims=1)[wanted], logits[wanted]
    size = max(1, ELEMENTS // kept.shape[-1])
    parts = [
        part.float().log_softmax(-1).gather(-1, of[:, None])[:, 0]
        for part, of in zip(kept.split(size), targets.split(size), strict=True)
    ]
    sums = torch.zeros(len(batch), dtype=torch.float64, device=device)
    return sums.index_add_(0, wanted.nonzero()[:, 0], torch.cat(parts).double()).cpu()


def _endings(tokenizer: Any, items: Sequence[Item]) -> Iterator[_Ending]:
    """Context and ending become tokens together, and are parted where the context ends."""
    contexts = tokenizer([item.query for item in items]).input_ids
    whole = tokenizer([f"{item.query} {e}" for item in items for e in item.choices])
    numbers = [i for i, item in enumerate(items) for _ in item.choices]
    for place, (number, ids) in enumerate(zip(numbers, whole.input_ids, strict=True)):
        yield _Ending(place, list(ids), len(contexts[number]))
