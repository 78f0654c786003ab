# SPDX-License-Identifier: Apache-2.0
"""Masks keep exactly the N best of every M; ties, refusals and the retained score."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nm_permute_plugin.maths.masks import nm_mask, retained_score
from nm_permute_plugin.maths.pattern import NMPattern

PATTERNS = ["1:2", "2:4", "1:4", "3:4", "4:8", "2:8", "5:16"]


@st.composite
def patterns(draw: st.DrawFn) -> NMPattern:
    m = draw(st.integers(2, 6))
    return NMPattern(draw(st.integers(1, m - 1)), m)


@st.composite
def scores_with_ties(draw: st.DrawFn, m: int) -> torch.Tensor:
    """Few distinct values, so that most groups hold ties."""
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    count = rows * groups * m
    values = draw(st.lists(st.integers(-2, 3), min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).reshape(rows, groups * m)


@given(st.data(), patterns())
def test_a_mask_keeps_the_best_subset_of_every_group(
    data: st.DataObject, pattern: NMPattern
) -> None:
    score = data.draw(scores_with_ties(pattern.m))
    groups = score.reshape(len(score), -1, pattern.m)
    kept = nm_mask(score, pattern).reshape(groups.shape)
    for row in range(groups.shape[0]):
        for group in range(groups.shape[1]):
            values = groups[row, group].tolist()
            # combinations() comes in the order of the channels: the first of the best
            # subsets is the one of the lowest channels.
            best = max(
                combinations(range(pattern.m), pattern.n),
                key=lambda subset: sum(values[channel] for channel in subset),
            )
            assert tuple(kept[row, group].nonzero().flatten().tolist()) == best


@pytest.mark.parametrize("text", PATTERNS)
def test_a_mask_keeps_n_of_every_m(text: str, generator: torch.Generator) -> None:
    pattern = NMPattern.parse(text)
    mask = nm_mask(torch.rand(6, 5 * pattern.m, generator=generator), pattern)
    assert mask.dtype == torch.bool
    assert bool((mask.reshape(6, 5, pattern.m).sum(-1) == pattern.n).all())


@pytest.mark.parametrize("text", PATTERNS)
def test_equal_scores_keep_the_lower_channels(text: str) -> None:
    pattern = NMPattern.parse(text)
    expected = [True] * pattern.n + [False] * (pattern.m - pattern.n)
    assert nm_mask(torch.ones(1, 2 * pattern.m), pattern)[0].tolist() == expected * 2


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"]
)
def test_a_score_that_is_not_finite_is_refused_by_row_and_channel(bad: float) -> None:
    score = torch.ones(3, 8)
    score[1, 6] = bad
    with pytest.raises(ValueError, match="row 1, input channel 6"):
        nm_mask(score, NMPattern(2, 4))


@pytest.mark.parametrize("judge", [nm_mask, retained_score])
def test_a_width_that_m_does_not_divide_is_refused(judge) -> None:
    with pytest.raises(ValueError, match="M=4 of the pattern 2:4 .* 6 input channels"):
        judge(torch.ones(2, 6), NMPattern(2, 4))


@pytest.mark.parametrize("text", PATTERNS)
def test_retained_score_sums_the_kept_scores(
    text: str, generator: torch.Generator
) -> None:
    pattern = NMPattern.parse(text)
    score = torch.rand(7, 3 * pattern.m, generator=generator)
    best = score.double().reshape(7, 3, pattern.m).topk(pattern.n, dim=-1).values.sum()
    assert retained_score(score, pattern) == pytest.approx(float(best), rel=1e-12)


def test_retained_score_adds_up_in_float64() -> None:
    # 2**24 + 1 has no float32: a float32 sum would lose every one of the ones.
    score = torch.tensor([[2.0**24, 0, 1, 0, 1, 0, 1, 0]])
    assert retained_score(score, NMPattern(1, 2)) == 2.0**24 + 3
