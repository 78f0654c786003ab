# SPDX-License-Identifier: Apache-2.0
"""The dense model's outputs are those of a run, and it runs once where it can."""

import pytest
import torch
from torch import Tensor, nn

from nm_permute_plugin.pruning.running import teacher as module
from nm_permute_plugin.pruning.running.loss import LossWeights, run
from nm_permute_plugin.pruning.running.teacher import Teacher

LOGITS = LossWeights()


@pytest.fixture
def runs() -> list[int]:
    """Rows that the model was run for, a number a run."""
    return []


@pytest.fixture(params=["tied", "untied"])
def model(request, tiny_model, runs: list[int]) -> nn.Module:
    model = tiny_model("llama", tie_word_embeddings=request.param == "tied")
    model.model.norm.register_forward_hook(
        lambda norm, inputs, out: runs.append(len(out))
    )
    return model


@pytest.fixture
def batches(tokens: Tensor) -> list[dict[str, Tensor]]:
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    return [{"input_ids": tokens}, {"input_ids": 47 - tokens, "attention_mask": mask}]


def test_the_model_runs_once_a_batch(model, batches, runs: list[int]) -> None:
    teacher = Teacher(model, LOGITS)
    with torch.no_grad():
        expected = [run(model, batch, LOGITS).logits for batch in batches]
    runs.clear()
    for _ in range(3):
        for batch, logits in zip(batches, expected, strict=True):
            found = teacher(batch).logits
            assert torch.equal(found, logits)
            assert not found.requires_grad
    assert runs == [3, 3]
    assert [m for m in model.modules() if m._forward_pre_hooks] == []


def test_slices_of_a_batch_are_known_again(model, tokens, runs: list[int]) -> None:
    teacher = Teacher(model, LOGITS)
    expected = teacher({"input_ids": tokens}).logits
    for _ in range(2):
        for rows in (slice(0, 2), slice(2, 3)):
            found = teacher({"input_ids": tokens[rows]}).logits
            torch.testing.assert_close(found, expected[rows])
    assert runs == [3, 2, 1]


def test_other_tokens_are_not_taken_for_those_that_are_gone(model, runs) -> None:
    teacher = Teacher(model, LOGITS)
    for token in range(40):
        ids = torch.full((1, 8), token)
        with torch.no_grad():
            expected = model(ids).logits
        assert torch.equal(teacher({"input_ids": ids}).logits, expected)
        del ids


def test_what_is_no_more_than_the_memory_allows_is_kept(
    model, batches, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 3 * 12 * 32 * 4)
    teacher = Teacher(model, LOGITS)
    for _ in range(2):
        for batch in batches:
            teacher(batch)
    assert len(runs) == 3


def test_a_model_that_changes_its_logits_afterwards_runs_every_time(
    model, batches, runs: list[int]
) -> None:
    """As those do that cap or scale what their output layer gives."""
    whole = model.forward

    def capped(*args, **kwargs):
        out = whole(*args, **kwargs)
        out.logits = out.logits.tanh()
        return out

    model.forward = capped
    teacher = Teacher(model, LOGITS)
    first, again = (teacher(batches[0]).logits for _ in range(2))
    assert torch.equal(first, again)
    assert float(first.abs().max()) <= 1
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("weights", "keep"),
    [(LOGITS, False), (LossWeights(hidden=1.0), True)],
    ids=["told so", "hidden states"],
)
def test_nothing_is_kept_where_it_would_not_help(
    model, batches, runs: list[int], weights: LossWeights, keep: bool
) -> None:
    teacher = Teacher(model, weights, keep)
    outputs = [teacher(batches[0]) for _ in range(2)]
    assert len(runs) == 2
    assert {len(out.hidden) for out in outputs} == {3 if weights.hidden else 0}
