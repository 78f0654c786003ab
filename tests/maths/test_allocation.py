# SPDX-License-Identifier: Apache-2.0
"""Channels dealt to groups, and what each gains where it joins."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nm_permute_plugin.maths.allocation import allocate, joining_gain
from nm_permute_plugin.maths.masks import retained_score
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import check_permutation

PATTERNS = ["2:4", "1:2", "1:4", "3:4", "4:8"]


def random_score(seed: int, rows: int, channels: int) -> Tensor:
    """Heavy-tailed scores with loud channels, as those of language models are."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(rows, channels, generator=generator).exp()
    return score * torch.randn(channels, generator=generator).exp()


@pytest.mark.parametrize("m", [2, 4, 8])
def test_dealing_spreads_the_strongest_channels(m: int) -> None:
    groups = 6
    score = random_score(0, rows=5, channels=groups * m)
    perm = allocate(score, m)
    check_permutation(perm)
    strength = score.sum(0).argsort(descending=True).argsort()
    # Each group holds one channel of every rank band.
    bands = (strength[perm] // groups).reshape(groups, m).sort(dim=-1).values
    assert torch.equal(bands, torch.arange(m).expand(groups, m))


def test_segments_are_dealt_as_if_each_stood_alone() -> None:
    scores = torch.stack([random_score(seed, 5, 12) for seed in range(3)])
    alone = torch.stack([allocate(score, 4) for score in scores])
    assert torch.equal(allocate(scores, 4), alone)


@given(st.integers(0, 9999), st.integers(1, 6), st.integers(1, 6), st.integers(1, 40))
def test_the_gain_is_the_sum_of_what_exceeds_the_threshold(
    seed: int, channels: int, groups: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    joining = torch.rand(rows, channels, generator=generator)
    threshold = torch.rand(rows, groups, generator=generator)
    direct = (joining.double()[:, :, None] - threshold.double()[:, None]).relu().sum(0)
    gain = joining_gain(joining.T, threshold.T)
    torch.testing.assert_close(gain.double(), direct, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", PATTERNS)
def test_the_gain_is_the_change_of_the_retained_score(text: str) -> None:
    pattern = NMPattern.parse(text)
    companions = random_score(1, rows=20, channels=pattern.m - 1)
    channel = random_score(2, rows=20, channels=1)
    ranked = companions.sort(dim=1, descending=True).values
    threshold = ranked[:, pattern.n - 1, None]
    with_it = retained_score(torch.cat([companions, channel], dim=1), pattern)
    without = float(ranked[:, : pattern.n].double().sum())
    gain = float(joining_gain(channel.T, threshold.T))
    assert gain == pytest.approx(with_it - without, rel=1e-4, abs=1e-4)
