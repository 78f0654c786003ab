# SPDX-License-Identifier: Apache-2.0
"""Perplexity of models whose distribution is known, window by window."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nm_permute_plugin.evaluation.perplexity import (
    evaluate_checkpoint,
    perplexity,
    tokenize,
)
from nm_permute_plugin.evaluation.pretrained import load_checkpoint

PROBABILITIES = torch.tensor([0.5, 0.25, 0.125, 0.125])


class Fixed(nn.Module):
    """Predicts ``PROBABILITIES`` whatever came before, and keeps what it was given."""

    def __init__(self, probabilities: Tensor = PROBABILITIES) -> None:
        super().__init__()
        self.logits = nn.Parameter(probabilities.log())
        self.seen: list[Tensor] = []

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.seen.append(input_ids)
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


class CopiesTheLast(nn.Module):
    """Is certain that a token comes again: right but for the jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(4.0))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.sure * nn.functional.one_hot(input_ids, 4))


def test_perplexity_of_a_known_distribution() -> None:
    # 0 opens the window; then -log2 p is 1, 2, 3, 3, 1 bits: 2 bits on average.
    tokens = torch.tensor([3, 0, 1, 2, 3, 0])
    assert perplexity(Fixed(), tokens, 6) == pytest.approx(2 ** (10 / 5))


def test_a_uniform_model_is_as_perplexed_as_it_has_tokens() -> None:
    model = Fixed(torch.full((7,), 1 / 7))
    assert perplexity(model, torch.arange(7).repeat(4), 5) == pytest.approx(7)


def test_the_first_token_of_every_window_is_not_predicted() -> None:
    # Windows (3 0 0) and (3 0 0): the rare 3 comes first and counts nowhere.
    tokens = torch.tensor([3, 0, 0, 3, 0, 0])
    assert perplexity(Fixed(), tokens, 3) == pytest.approx(2)
    assert perplexity(Fixed(), tokens, 6) == pytest.approx(2 ** (7 / 5))


def test_each_token_is_predicted_from_those_before_it() -> None:
    model, tokens = CopiesTheLast(), torch.tensor([2, 2, 2, 1])
    right = math.exp(4) / (math.exp(4) + 3)
    wrong = 1 / (math.exp(4) + 3)
    expected = math.exp(-(2 * math.log(right) + math.log(wrong)) / 3)
    assert perplexity(model, tokens, 4) == pytest.approx(expected)


def test_the_rest_that_fills_no_window_is_left_out() -> None:
    model = Fixed()
    tokens = torch.tensor([0, 0, 0, 0, 3, 3, 3])
    assert perplexity(model, tokens, 4) == pytest.approx(2)
    assert [batch.tolist() for batch in model.seen] == [[[0, 0, 0, 0]]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_windows_at_a_time_change_nothing(batch_size: int) -> None:
    tokens = torch.randint(4, (50,), generator=torch.Generator().manual_seed(0))
    one = perplexity(Fixed(), tokens, 7)
    model = Fixed()
    assert perplexity(model, tokens, 7, batch_size) == pytest.approx(one)
    assert max(map(len, model.seen)) == min(batch_size, 7)


def test_a_text_that_fills_no_window_is_refused() -> None:
    with pytest.raises(ValueError, match="has 9 tokens, less than one window of 10"):
        perplexity(Fixed(), torch.zeros(9, dtype=torch.int64), 10)


@pytest.mark.parametrize("length", [1, 0, -4])
def test_a_window_that_predicts_nothing_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        perplexity(Fixed(), torch.zeros(9, dtype=torch.int64), length)


@pytest.mark.parametrize(
    "logits",
    [torch.full((4,), float("nan")), torch.tensor([0.0, 0.0, 0.0, float("-inf")])],
    ids=["nan", "a token that cannot come"],
)
def test_broken_weights_are_refused(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="broken weights"):
        perplexity(Fixed(logits.exp()), torch.tensor([3, 3, 3]), 3)


def test_a_likelihood_too_small_for_a_float_is_refused() -> None:
    model = Fixed()
    with torch.no_grad():
        model.logits.copy_(torch.tensor([9000.0, 0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="broken weights"):
        perplexity(model, torch.tensor([3, 3, 3]), 3)


def test_text_becomes_one_stream_without_special_tokens(tiny_checkpoint) -> None:
    tokens = tokenize(tiny_checkpoint(), "w03 w05\n\nw47 unknown")
    assert tokens.tolist() == [3, 5, 47, 0]
    assert tokens.dtype == torch.int64
    assert tokenize(tiny_checkpoint(), "").tolist() == []


def test_a_checkpoint_from_disk_is_as_good_as_its_model(
    trained_checkpoint: Path, chain_rows
) -> None:
    tokens = chain_rows(1, 640, seed=77)[0]
    model = load_checkpoint(trained_checkpoint, "cpu")
    measured = evaluate_checkpoint(trained_checkpoint, tokens, 32, "cpu", batch_size=4)
    assert measured == pytest.approx(perplexity(model, tokens, 32))
    # 48 tokens, of which nine in ten are certain once the chain is learned
    assert 1.5 < measured < 4
