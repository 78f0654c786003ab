# SPDX-License-Identifier: Apache-2.0
"""Losses of next-token distributions that never hold more than a few tokens in float32."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ELEMENTS = 1 << 26
"""Logits in float32 at a time; more do not make a GPU any faster."""


def divergence(
    ours: Float[Tensor, "*tokens vocabulary"],
    theirs: Float[Tensor, "*tokens vocabulary"],
    counted: Bool[Tensor, "*tokens"],
) -> Float[Tensor, ""]:
    """
    ``KL(theirs || ours)`` in nats, the mean over the tokens that count.

    Its gradient goes to ``ours`` and is exact; nothing is kept for it but the logits, so
    the memory beside them is that of a chunk of tokens.

    :param ours: logits
    :param theirs: logits of the distribution to be met
    :param counted: the tokens that count; the mean of none is not a number

    >>> logits = torch.tensor([[0.0, 0.0], [5.0, 1.0]])
    >>> divergence(logits, logits.flip(0), torch.tensor([False, False])).isnan()
    tensor(True)
    """
    kind = _DivergenceInTriton if _in_triton(ours) else _Divergence
    value: Tensor = kind.apply(
        ours.flatten(0, -2), theirs.detach().flatten(0, -2), counted.flatten()
    )
    return value


def cross_entropy(
    logits: Float[Tensor, "rows tokens vocabulary"],
    ids: Int[Tensor, "rows tokens"],
    counted: Bool[Tensor, "rows tokens"],
) -> Float[Tensor, ""]:
    """
    ``-log p(next token)``, the mean over the tokens that count and whose next one does.

    Memory as in ``divergence``.
    """
    pairs = torch.zeros_like(counted)
    pairs[:, :-1] = counted[:, 1:] & counted[:, :-1]
    value: Tensor = _CrossEntropy.apply(
        logits.flatten(0, -2), ids.roll(-1, dims=1).flatten(), pairs.flatten()
    )
    return value


class _Divergence(torch.autograd.Function):
    """Softmaxes are made anew in backward."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, counted: Tensor) -> Tensor:
        ctx.save_for_backward(ours, theirs, counted)
        total = torch.zeros((), device=ours.device)
        for part in _chunks(ours):
            log_ours = ours[part].float().log_softmax(-1)
            log_theirs = theirs[part].float().log_softmax(-1)
            of_token = (log_theirs.exp() * log_theirs.sub(log_ours)).sum(-1)
            total += of_token.masked_fill(~counted[part], 0).sum()
        return total / counted.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ours, theirs, counted = ctx.saved_tensors
        scale = grads[0] / counted.sum()
        grad = torch.empty_like(ours)
        for part in _chunks(ours):
            change = ours[part].float().softmax(-1)
            change -= theirs[part].float().softmax(-1)
            change.mul_(scale).masked_fill_(~counted[part, None], 0)
            grad[part] = change
        return grad, None, None


class _DivergenceInTriton(torch.autograd.Function):
    """The same; two numbers a token are kept besides the logits."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, counted: Tensor) -> Tensor:
        from nm_permute_plugin.maths.kl_triton import of_tokens

        ours, theirs = ours.contiguous(), theirs.contiguous()
        values, log_sums = of_tokens(ours, theirs, counted)
        ctx.save_for_backward(ours, theirs, counted, log_sums)
        return values.sum() / counted.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from nm_permute_plugin.maths.kl_triton import gradient

        ours, theirs, counted, log_sums = ctx.saved_tensors
        scale = grads[0] / counted.sum()
        return gradient(ours, theirs, counted, log_sums, scale), None, None


class _CrossEntropy(torch.autograd.Function):
    """Softmaxes are made anew in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets, counted)
        total = torch.zeros((), device=logits.device)
        for part in _chunks(logits):
            log_ours = logits[part].float().log_softmax(-1)
            of_token = log_ours.gather(-1, targets[part, None])[:, 0]
            total -= of_token.masked_fill(~counted[part], 0).sum()
        return total / counted.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, counted = ctx.saved_tensors
        scale = grads[0] / counted.sum()
        grad = torch.empty_like(logits)
        for part in _chunks(logits):
            change = logits[part].float().softmax(-1)
            at = targets[part, None]
            change.scatter_add_(-1, at, -torch.ones_like(at, dtype=change.dtype))
            change.mul_(scale).masked_fill_(~counted[part, None], 0)
            grad[part] = change
        return grad, None, None


def _in_triton(logits: Tensor) -> bool:
    return logits.is_cuda and find_spec("triton") is not None


def _chunks(logits: Tensor) -> Iterator[slice]:
    tokens, vocabulary = logits.shape
    size = max(1, ELEMENTS // vocabulary)
    return (slice(first, first + size) for first in range(0, tokens, size))
