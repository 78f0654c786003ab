# SPDX-License-Identifier: Apache-2.0
"""The dense model's outputs are those of a run, and it runs once where it can."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nm_permute_plugin.pruning.running import teacher as module
from nm_permute_plugin.pruning.running.loss import run
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import LossSettings
from nm_permute_plugin.specs.fold import fold

LOGITS = LossSettings()


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


def test_nothing_is_known_of_what_would_not_be_kept(
    model, batches, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = batches
    teacher = Teacher(model, LOGITS, keep_training=False)
    assert teacher.known(first) is None
    assert runs == []
    logits = teacher(first).logits  # as a validation batch
    assert torch.equal(teacher.known(first).logits, logits)
    assert len(runs) == 1
    monkeypatch.setattr(module, "MOST_BYTES", 3 * 12 * 32 * 4)
    teacher = Teacher(model, LOGITS)
    for batch in batches:
        assert teacher.known(batch) is not None  # the second is run, and does not fit
    assert teacher.known(first) is not None
    assert teacher.known(second) is None
    assert len(runs) == 3


@pytest.mark.parametrize(
    ("device", "steps", "pays"),
    [("cpu", 1, True), ("cuda", 49, False), ("cuda", 50, True)],
)
def test_on_a_gpu_only_what_is_seen_often_is_kept(
    device: str, steps: int, pays: bool
) -> None:
    class Placed(nn.Module):
        def parameters(self, recurse: bool = True):
            return iter([SimpleNamespace(device=torch.device(device))])

    assert module.pays_to_keep(Placed(), steps, 10) is pays


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
    [(LOGITS, False), (LossSettings(hidden=1.0), True)],
    ids=["told so", "hidden states"],
)
def test_nothing_is_kept_where_it_would_not_help(
    model, batches, runs: list[int], weights: LossSettings, keep: bool
) -> None:
    teacher = Teacher(model, weights, keep)
    outputs = [teacher(batches[0]) for _ in range(2)]
    assert len(runs) == 2
    assert {len(out.hidden) for out in outputs} == {3 if weights.hidden else 0}


def test_a_fold_is_followed_without_a_run(
    model, batches, runs: list[int], resolve_model, legal_perms
) -> None:
    teacher = Teacher(model, LOGITS)
    for batch in batches:
        teacher(batch)
    resolved = resolve_model(model)
    perms = legal_perms(resolved)
    fold(model, resolved, perms)
    with torch.no_grad():
        folded = [model(**batch).logits for batch in batches]
    runs.clear()
    teacher.fold(perms["residual"])
    for batch, logits in zip(batches, folded, strict=True):
        torch.testing.assert_close(teacher(batch).logits, logits, rtol=1e-4, atol=1e-5)
    assert runs == []


def test_a_fold_in_an_unknown_order_has_the_model_run_anew(
    model, batches, runs: list[int]
) -> None:
    teacher = Teacher(model, LOGITS)
    expected = teacher(batches[0]).logits
    teacher.fold(None)
    assert torch.equal(teacher(batches[0]).logits, expected)
    assert torch.equal(teacher(batches[0]).logits, expected)
    assert len(runs) == 2


def test_the_memory_that_will_be_taken_is_known_in_advance(
    model, batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where other batches, those of the validation, are kept already, too."""
    teacher = Teacher(model, LOGITS)
    of_a_batch = 3 * 12 * 32 * 4
    assert teacher.bytes_to_come(batches) == module.MOST_BYTES
    teacher({"input_ids": batches[0]["input_ids"].flip(0)})
    assert teacher.bytes_to_come(batches) == 2 * of_a_batch
    teacher(batches[0])
    assert teacher.bytes_to_come(batches) == of_a_batch
    monkeypatch.setattr(module, "MOST_BYTES", 2 * of_a_batch + 8)
    assert teacher.bytes_to_come(batches) == 8
    teacher(batches[1])
    assert teacher.bytes_to_come(batches[:1]) == 0
    assert Teacher(model, LossSettings(hidden=1.0)).bytes_to_come(batches) == 0


def test_validation_is_the_mean_loss_of_the_masked_model(model, batches) -> None:
    teacher = Teacher(model, LOGITS)
    assert teacher.validate({}, batches) == pytest.approx(0, abs=1e-6)
    name = "model.layers.0.mlp.down_proj"
    masks = {name: torch.zeros_like(model.get_submodule(name).weight)}
    each = [teacher.validate(masks, [batch]) for batch in batches]
    assert min(each) > 0
    assert teacher.validate(masks, batches) == pytest.approx(sum(each) / 2, rel=1e-6)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the validation loss is nan"):
        Teacher(model, LOGITS).validate(masks, batches)
