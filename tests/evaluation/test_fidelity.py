# SPDX-License-Identifier: Apache-2.0
"""How near two models predict: equal to a direct computation, and refused where unlike."""

import math
from pathlib import Path

import pytest
import torch
from loguru import logger
from torch import Tensor, nn

from nm_permute_plugin.evaluation import fidelity as module
from nm_permute_plugin.evaluation.fidelity import (
    Fidelity,
    compare_checkpoints,
    fidelity,
    refuse_other_tokens,
)
from nm_permute_plugin.evaluation.perplexity import perplexity


@pytest.fixture
def pair(tiny_model) -> tuple[nn.Module, nn.Module]:
    """A model, and a dense one that it is near to."""
    dense, ours = tiny_model("llama"), tiny_model("llama")
    ours.load_state_dict(dense.state_dict())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    return ours, dense


def directly(ours: nn.Module, dense: nn.Module, windows: list[Tensor]) -> Fidelity:
    """Each window by itself, each token by itself, in Python's own numbers."""
    nll = dense_nll = divergence = 0.0
    same = flips = tokens = 0
    for window in windows:
        p, q = (
            model(input_ids=window[None]).logits[0].double().softmax(-1)
            for model in (dense, ours)
        )
        for place, token in enumerate(window[1:].tolist()):
            dense_p, our_p = p[place].tolist(), q[place].tolist()
            nll -= math.log(our_p[token])
            dense_nll -= math.log(dense_p[token])
            pairs = zip(dense_p, our_p, strict=True)
            divergence += sum(a * math.log(a / b) for a, b in pairs)
            tops = [x.index(max(x)) for x in (our_p, dense_p)]
            same += tops[0] == tops[1]
            flips += (tops[0] == token) != (tops[1] == token)
            tokens += 1
    ppl, dense_ppl = math.exp(nll / tokens), math.exp(dense_nll / tokens)
    shares = (divergence / tokens, same / tokens, flips / tokens)
    return Fidelity(ppl, dense_ppl, *shares, tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("batch_size", "turn"), [(1, None), (2, None), (8, None), (1, 2), (2, 4), (2, 8)]
)
@torch.no_grad()
def test_it_equals_a_direct_computation(
    pair,
    dtype: torch.dtype,
    batch_size: int,
    turn: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, dense = (model.to(dtype) for model in pair)
    lengths = (12, 12, 7, 2, 12)
    windows = [torch.randint(48, (length,)) for length in lengths]
    expected = directly(ours, dense, windows)
    assert 0 < expected.agreement < 1
    assert expected.flips > 0
    monkeypatch.setattr(module, "ELEMENTS", 5 * 48)  # chunks that no window is made of
    found = fidelity(ours, dense, windows, batch_size, turn)
    rel = 1e-10 if dtype == torch.float64 else 1e-4
    assert (found.agreement, found.flips) == (expected.agreement, expected.flips)
    assert found.tokens == expected.tokens == sum(lengths) - len(lengths)
    for name in ("perplexity", "dense", "divergence"):
        wanted = pytest.approx(getattr(expected, name), rel=rel)
        assert getattr(found, name) == wanted, name
    # That one sums in float32.
    assert found.perplexity == pytest.approx(perplexity(ours, windows), rel=1e-6)


def test_a_model_is_like_itself(pair) -> None:
    ours, _ = pair
    found = fidelity(ours, ours, [torch.randint(48, (9,))])
    assert (found.divergence, found.agreement, found.flips) == (0.0, 1.0, 0.0)
    assert found.perplexity == found.dense


def test_models_that_do_not_fit_together_take_turns(
    trained_checkpoint: Path, tiny_checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_checkpoint()
    windows = list(torch.randint(48, (5, 9)))
    together = compare_checkpoints(other, trained_checkpoint, windows, "cpu", 2)
    load, loaded = module.load_checkpoint, []

    def full_at_first(folder: Path, device: str) -> nn.Module:  # as a GPU would be
        loaded.append(folder)
        if loaded == [other, trained_checkpoint]:
            raise torch.OutOfMemoryError
        return load(folder, device)

    monkeypatch.setattr(module, "load_checkpoint", full_at_first)
    monkeypatch.setattr(module, "KEPT", 3 * 9 * 48)
    said: list[str] = []
    sink = logger.add(said.append, level="WARNING")
    assert compare_checkpoints(other, trained_checkpoint, windows, "cpu", 2) == together
    logger.remove(sink)
    assert loaded == [other, trained_checkpoint, trained_checkpoint]
    assert "no room for both models: they take turns of 3 windows" in said[0]


def test_a_model_of_another_vocabulary_is_refused(tiny_checkpoint) -> None:
    ours, other = tiny_checkpoint(), tiny_checkpoint(name="other", vocab_size=64)
    with pytest.raises(
        ValueError, match="one of 48 tokens and the dense model one of 64"
    ):
        compare_checkpoints(ours, other, [torch.randint(48, (9,))], "cpu")


def test_windows_of_another_tokenizer_are_refused() -> None:
    windows = [torch.tensor([1, 2, 3])]
    refuse_other_tokens(windows, [torch.tensor([1, 2, 3])], "a", "b")
    for other in ([torch.tensor([1, 2, 4])], [torch.tensor([1, 2])], windows * 2):
        with pytest.raises(
            ValueError, match="tokenizers of a and b turn the text into"
        ):
            refuse_other_tokens(windows, other, "a", Path("b"))


def test_broken_weights_are_refused(pair) -> None:
    ours, dense = pair
    with torch.no_grad():
        next(dense.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="broken weights"):
        fidelity(ours, dense, [torch.randint(48, (9,))])
