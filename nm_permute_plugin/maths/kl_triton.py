# SPDX-License-Identifier: Apache-2.0
"""``divergence`` in Triton: each pass reads the logits once; import it with Triton."""

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

ENTRIES = 4096
"""Of the vocabulary at a time."""

WARPS = 8


@triton.jit
def load_logits(row, at, exists):
    """Some logits in float32, -inf where there are none."""
    return tl.load(row + at, mask=exists, other=-float("inf")).to(tl.float32)


@triton.jit
def tokens_kernel(
    ours,  # [tokens, entries]
    theirs,  # [tokens, entries]
    counted,  # uint8 [tokens]
    values,  # float32 [tokens]
    ours_log_sum,  # float32 [tokens]
    theirs_log_sum,  # float32 [tokens]
    entries,
    ENTRIES: tl.constexpr,
):
    """The divergence of one token, and the log-sum-exp of both its rows."""
    token = tl.program_id(0).to(tl.int64)
    our_row, their_row = ours + token * entries, theirs + token * entries
    our_most, their_most = -float("inf"), -float("inf")
    our_sum, their_sum, weighted = 0.0, 0.0, 0.0
    for first in range(0, entries, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        exists = at < entries
        o, t = load_logits(our_row, at, exists), load_logits(their_row, at, exists)
        most = tl.maximum(our_most, tl.max(o, axis=0))
        our_sum = our_sum * tl.exp(our_most - most) + tl.sum(tl.exp(o - most), axis=0)
        our_most = most
        most = tl.maximum(their_most, tl.max(t, axis=0))
        share, earlier = tl.exp(t - most), tl.exp(their_most - most)
        lead = tl.where(exists, t - o, 0.0)
        weighted = weighted * earlier + tl.sum(share * lead, axis=0)
        their_sum = their_sum * earlier + tl.sum(share, axis=0)
        their_most = most
    our_log_sum = our_most + tl.log(our_sum)
    their_log_sum = their_most + tl.log(their_sum)
    value = weighted / their_sum - their_log_sum + our_log_sum
    value = tl.where(tl.load(counted + token) != 0, value, 0.0)
    tl.store(values + token, value)
    tl.store(ours_log_sum + token, our_log_sum)
    tl.store(theirs_log_sum + token, their_log_sum)


@triton.jit
def gradient_kernel(
    ours,  # [tokens, entries]
    theirs,  # [tokens, entries]
    counted,  # uint8 [tokens]
    ours_log_sum,  # float32 [tokens]
    theirs_log_sum,  # float32 [tokens]
    scale,  # float32 [1]
    grad,  # [tokens, entries]
    entries,
    ENTRIES: tl.constexpr,
):
    """``scale (softmax(ours) - softmax(theirs))`` of some entries of a token."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    exists = at < entries
    o = load_logits(ours + token * entries, at, exists)
    t = load_logits(theirs + token * entries, at, exists)
    change = tl.exp(o - tl.load(ours_log_sum + token))
    change -= tl.exp(t - tl.load(theirs_log_sum + token))
    change = tl.where(tl.load(counted + token) != 0, change * tl.load(scale), 0.0)
    tl.store(grad + token * entries + at, change, mask=exists)


def of_tokens(
    ours: Float[Tensor, "tokens vocabulary"],
    theirs: Float[Tensor, "tokens vocabulary"],
    counted: Bool[Tensor, " tokens"],
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "2 tokens"]]:
    """
    ``KL(theirs || ours)`` of every token, 0 where it does not count, and what
    ``gradient`` needs of it: the log-sum-exp of ours and of theirs.

    :param ours: contiguous logits, as theirs
    """
    tokens, entries = ours.shape
    values = torch.empty(tokens, dtype=torch.float32, device=ours.device)
    log_sums = torch.empty(2, tokens, dtype=torch.float32, device=ours.device)
    with torch.cuda.device_of(ours):
        tokens_kernel[(tokens,)](
            ours,
            theirs,
            counted.view(torch.uint8),
            values,
            log_sums[0],
            log_sums[1],
            entries,
            ENTRIES=ENTRIES,
            num_warps=WARPS,
        )
    return values, log_sums


def gradient(
    ours: Float[Tensor, "tokens vocabulary"],
    theirs: Float[Tensor, "tokens vocabulary"],
    counted: Bool[Tensor, " tokens"],
    log_sums: Float[Tensor, "2 tokens"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, "tokens vocabulary"]:
    """The gradient of ``scale`` times the sum of the tokens' divergences, for ours."""
    tokens, entries = ours.shape
    grad = torch.empty_like(ours)
    with torch.cuda.device_of(ours):
        gradient_kernel[(tokens, triton.cdiv(entries, ENTRIES))](
            ours,
            theirs,
            counted.view(torch.uint8),
            log_sums[0],
            log_sums[1],
            scale,
            grad,
            entries,
            ENTRIES=ENTRIES,
            num_warps=WARPS,
        )
    return grad
