# SPDX-License-Identifier: Apache-2.0
"""Losses in chunks of tokens have the values and the gradients of the plain form."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nm_permute_plugin.maths import kl as module
from nm_permute_plugin.maths.kl import cross_entropy, divergence

VOCABULARY = 11


@pytest.fixture(params=[1, 3 * VOCABULARY, 1 << 26], ids=["1", "3", "all"])
def _tokens_at_a_time(request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ELEMENTS", request.param)


@pytest.fixture
def counted() -> Tensor:
    """Two rows of five tokens; the second ends in two of padding."""
    counted = torch.ones(2, 5, dtype=torch.bool)
    counted[1, 3:] = False
    return counted


def logits(generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    made = torch.randn(2, 5, VOCABULARY, generator=generator).mul(3)
    return made.to(dtype).requires_grad_()


def plain_divergence(ours: Tensor, theirs: Tensor, counted: Tensor) -> Tensor:
    log_ours = F.log_softmax(ours[counted].float(), dim=-1)
    log_theirs = F.log_softmax(theirs[counted].float(), dim=-1)
    return F.kl_div(log_ours, log_theirs, reduction="batchmean", log_target=True)


def plain_cross_entropy(ours: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    pairs = counted[:, 1:] & counted[:, :-1]
    return F.cross_entropy(ours[:, :-1][pairs].float(), ids[:, 1:][pairs])


@pytest.mark.usefixtures("_tokens_at_a_time")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("part", ["divergence", "cross entropy"])
def test_values_and_gradients_equal_the_plain_form(
    generator: torch.Generator, counted: Tensor, dtype: torch.dtype, part: str
) -> None:
    ours, theirs = logits(generator, dtype), logits(generator, dtype).detach()
    ids = torch.randint(VOCABULARY, (2, 5), generator=generator)
    copy = ours.detach().clone().requires_grad_()
    if part == "divergence":
        found = divergence(ours, theirs, counted)
        expected = plain_divergence(copy, theirs, counted)
    else:
        found = cross_entropy(ours, ids, counted)
        expected = plain_cross_entropy(copy, ids, counted)
    torch.testing.assert_close(found, expected)
    (3 * found).backward()
    (3 * expected).backward()
    assert float(copy.grad.abs().max()) > 0.01
    assert ours.grad.dtype == dtype
    close = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(ours.grad, copy.grad, **close)
    assert not bool(ours.grad[1, 3:].any())


def test_padding_that_is_not_finite_does_not_count(
    generator: torch.Generator, counted: Tensor
) -> None:
    ours, theirs = (logits(generator, torch.float32).detach() for _ in range(2))
    expected = divergence(ours, theirs, counted)
    ours[1, 4] = float("nan")
    ours.requires_grad_()
    found = divergence(ours, theirs, counted)
    found.backward()
    assert torch.equal(found, expected)
    assert bool(ours.grad.isfinite().all())


def test_only_the_logits_are_kept_for_backward(
    generator: torch.Generator, counted: Tensor
) -> None:
    ours, theirs = logits(generator, torch.float32), logits(generator, torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        divergence(ours, theirs, counted)
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() > counted.numel()}
    assert large == {ours.data_ptr(), theirs.data_ptr()}
