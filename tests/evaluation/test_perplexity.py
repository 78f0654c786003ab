# SPDX-License-Identifier: Apache-2.0
"""Perplexity of models whose distribution is known, window by window."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nm_permute_plugin.evaluation.perplexity import evaluate_checkpoint, perplexity
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
    assert perplexity(Fixed(), [tokens]) == pytest.approx(2 ** (10 / 5))


def test_a_uniform_model_is_as_perplexed_as_it_has_tokens() -> None:
    model = Fixed(torch.full((7,), 1 / 7))
    windows = torch.arange(7).repeat(5).view(7, 5)
    assert perplexity(model, list(windows)) == pytest.approx(7)


def test_the_first_token_of_every_window_is_not_predicted() -> None:
    # Windows (3 0 0) and (3 0 0): the rare 3 comes first and counts nowhere.
    tokens = torch.tensor([3, 0, 0, 3, 0, 0])
    assert perplexity(Fixed(), tokens.split(3)) == pytest.approx(2)
    assert perplexity(Fixed(), [tokens]) == pytest.approx(2 ** (7 / 5))


def test_each_token_is_predicted_from_those_before_it() -> None:
    model, tokens = CopiesTheLast(), torch.tensor([2, 2, 2, 1])
    right = math.exp(4) / (math.exp(4) + 3)
    wrong = 1 / (math.exp(4) + 3)
    expected = math.exp(-(2 * math.log(right) + math.log(wrong)) / 3)
    assert perplexity(model, [tokens]) == pytest.approx(expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_windows_at_a_time_change_nothing(batch_size: int) -> None:
    tokens = torch.randint(4, (50,), generator=torch.Generator().manual_seed(0))
    windows = tokens.split(7)
    one = perplexity(Fixed(), windows)
    model = Fixed()
    assert perplexity(model, windows, batch_size) == pytest.approx(one)
    assert max(map(len, model.seen)) == min(batch_size, 8)


def test_windows_of_a_batch_may_differ_in_length() -> None:
    windows = [torch.tensor(row) for row in ([3, 0, 0, 0, 0], [3, 2], [1, 1, 0])]
    # Five times 1 bit, 2 bits, and 3 bits; padding, which would be token 0, is none.
    assert perplexity(Fixed(), windows, 3) == pytest.approx(2 ** (10 / 7))


def test_a_model_in_training_is_measured_without_dropout(tiny_model, tokens) -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    windows = list(tokens)
    expected = perplexity(model, windows)
    model.train()
    model.model.layers[0].eval()
    assert perplexity(model, windows) == expected
    assert model.training
    assert not model.model.layers[0].training


@pytest.mark.parametrize("windows", [[], [torch.tensor([1])]])
def test_windows_that_predict_nothing_are_refused(windows: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="nothing is predicted"):
        perplexity(Fixed(), windows)


@pytest.mark.parametrize(
    "logits",
    [torch.full((4,), float("nan")), torch.tensor([0.0, 0.0, 0.0, float("-inf")])],
    ids=["nan", "a token that cannot come"],
)
def test_broken_weights_are_refused(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="broken weights"):
        perplexity(Fixed(logits.exp()), [torch.tensor([3, 3, 3])])


def test_a_likelihood_too_small_for_a_float_is_refused() -> None:
    model = Fixed()
    with torch.no_grad():
        model.logits.copy_(torch.tensor([9000.0, 0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="broken weights"):
        perplexity(model, [torch.tensor([3, 3, 3])])


def test_a_checkpoint_from_disk_is_as_good_as_its_model(
    trained_checkpoint: Path, chain_rows
) -> None:
    windows = list(chain_rows(20, 32, seed=77))
    model = load_checkpoint(trained_checkpoint, "cpu")
    measured = evaluate_checkpoint(trained_checkpoint, windows, "cpu", batch_size=4)
    assert measured == pytest.approx(perplexity(model, windows))
    # 48 tokens, of which nine in ten are certain once the chain is learned
    assert 1.5 < measured < 4
