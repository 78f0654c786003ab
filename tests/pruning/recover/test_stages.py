# SPDX-License-Identifier: Apache-2.0
"""Every stage under one rule: the mask stays, and validation text never gets worse."""

from typing import get_args

import pytest
import torch
from golden import count_dense_passes
from recovery import differing, planted, student_of, values_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nm_permute_plugin.pruning.data import Data, split_text
from nm_permute_plugin.pruning.recover.distill import distill
from nm_permute_plugin.pruning.recover.stages import StageRecord, recover
from nm_permute_plugin.pruning.recover.student import Student, Values
from nm_permute_plugin.pruning.running.memory import repeated_layers
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.search import History
from nm_permute_plugin.pruning.settings import RecoverStage, Settings

STAGES = get_args(RecoverStage)
FAST = {
    "rescale": {},
    "blocks": {"blocks": {"epochs": 3, "rate": 0.03}},
    "end_to_end": {"end_to_end": {"steps": 24, "rate": 0.03}},
}


@pytest.fixture
def data(chain_rows) -> Data:
    return split_text(list(chain_rows(40, 24, seed=1)), 4, validation_share=0.2, seed=0)


def only(*stages: RecoverStage, **changes: object) -> Settings:
    """The fast settings of some stages, with changes of other groups."""
    groups = [FAST[stage].items() for stage in stages]
    recover = {"stages": stages} | dict(item for group in groups for item in group)
    given = {"recover": recover, "validation": {"every": 8}}
    return Settings.model_validate(given | changes)


def distilling(every: int, **group: float) -> Settings:
    """Settings of the distillation alone."""
    recover = {"stages": "end_to_end", "end_to_end": group}
    return Settings.model_validate({"recover": recover, "validation": {"every": every}})


def teacher_of(student: Student) -> Teacher:
    return Teacher(student.model, Settings().loss)


def run(student: Student, data: Data, settings: Settings) -> list[StageRecord]:
    return recover(student, teacher_of(student), data, settings)


def distilled(
    student: Student, data: Data, settings: Settings
) -> tuple[Values, History]:
    return distill(student, teacher_of(student), data, settings)


def loss_of(student: Student, data: Data, values: Values | None = None) -> float:
    masks = student.masks(values)
    return teacher_of(student).validate(masks, data.validation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_changes_kept_weights_and_no_mask(
    trained_checkpoint, data: Data, stage: RecoverStage, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained_checkpoint, dtype=dtype)
    student = student_of(model)
    before = values_of(student)
    lost = loss_of(student, data)
    (record,) = run(student, data, only(stage))
    assert record.stage == stage
    assert record.validation[0] == lost
    left = loss_of(student, data)
    assert left <= lost
    assert record.kept == (left < lost)
    assert left == (record.validation[1] if record.kept else lost)
    assert (differing(before, student.values) != []) == record.kept
    for name, value in student.values.items():
        assert value.dtype == dtype
        assert torch.equal(value == 0, before[name] == 0)
        assert not bool(torch.signbit(value[value == 0]).any())
    if stage != "rescale":
        assert left < 0.7 * lost


@pytest.mark.parametrize(("stage", "share"), [("blocks", 0.5), ("end_to_end", 0.5)])
def test_most_of_a_planted_loss_is_regained(
    tiny_model, data: Data, stage: RecoverStage, share: float
) -> None:
    student = planted(tiny_model("qwen3"))
    (record,) = run(student, data, only(stage))
    assert record.validation[1] < share * record.validation[0]


def test_stages_go_on_from_each_other(trained_checkpoint, data: Data) -> None:
    student = student_of(AutoModelForCausalLM.from_pretrained(trained_checkpoint))
    records = run(student, data, only("end_to_end", "rescale", "blocks"))
    assert [record.stage for record in records] == ["end_to_end", "rescale", "blocks"]
    loss = records[0].validation[0]
    for record in records:
        assert record.validation[0] == loss
        loss = record.validation[1] if record.kept else loss
    assert loss_of(student, data) == loss


def test_a_stage_that_makes_the_whole_model_worse_is_dropped(
    tiny_model, data: Data
) -> None:
    # The kept weights are the best already: energy that the mask took is no loss here.
    student = planted(tiny_model("llama"), noise=0.0)
    before = values_of(student)
    for stage in STAGES:
        settings = distilling(1, rate=3.0, steps=2)
        if stage != "end_to_end":
            settings = only(stage)
        (record,) = run(student, data, settings)
        assert not record.kept
    assert differing(before, student.values) == []


@pytest.mark.parametrize("stage", STAGES)
def test_the_seed_decides(tiny_model, data: Data, stage: RecoverStage) -> None:
    runs = []
    for seed in (4, 4, 5):
        student = planted(tiny_model("llama"))
        run(student, data, only(stage, seed=seed))
        runs.append(values_of(student))
    assert differing(runs[0], runs[1]) == []
    if stage != "rescale":  # which has no random choice
        assert differing(runs[0], runs[2]) != []


def test_distilling_looks_at_the_start_and_the_end(tiny_model, data: Data) -> None:
    student = student_of(tiny_model("llama"))
    settings = distilling(2, steps=5, rate=0.03)
    values, history = distilled(student, data, settings)
    assert [entry["step"] for entry in history] == [0, 2, 4, 5]
    best = min(entry["validation"] for entry in history)
    assert loss_of(student, data, values) == best


def test_distilling_that_never_helps_gives_nothing(tiny_model, data: Data) -> None:
    student = student_of(tiny_model("llama"))
    values, history = distilled(student, data, distilling(1, steps=2, rate=50.0))
    assert all(entry["validation"] >= history[0]["validation"] for entry in history)
    assert values == {}


def test_no_gradient_and_no_forward_stays_behind(tiny_model, data: Data) -> None:
    model = tiny_model("llama")
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(student_of(model), data, only(*STAGES))
    assert differing(dense, {n: p.detach() for n, p in model.named_parameters()}) == []
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [m for m in model.modules() if "forward" in m.__dict__] == []


@pytest.mark.parametrize("size", [1, 2])
def test_distilling_obeys_the_micro_batch_size(
    tiny_model, data: Data, size: int
) -> None:
    whole, parts = student_of(tiny_model("llama")), student_of(tiny_model("llama"))
    settings = only("end_to_end")
    run(whole, data, settings)
    rows: list[int] = []
    norm = parts.model.model.norm
    norm.register_forward_hook(
        lambda module, inputs, out: rows.append(len(out)) if out.requires_grad else None
    )
    memory = settings.memory.model_copy(update={"micro_batch_size": size})
    run(parts, data, settings.model_copy(update={"memory": memory}))
    assert set(rows) == {size}
    for name, value in parts.values.items():
        torch.testing.assert_close(value, whole.values[name], rtol=0.01, atol=0.01)


def test_distilling_obeys_gradient_checkpointing(tiny_model, data: Data) -> None:
    counts, values = [], []
    for again in (False, True):
        student = student_of(tiny_model("llama"))
        layers = repeated_layers(student.model, student.linears)
        runs: list[nn.Module] = []
        for layer in layers:
            layer.input_layernorm.register_forward_hook(
                lambda module, *rest, runs=runs: runs.append(module)
            )
        memory = {"gradient_checkpointing": again}
        run(student, data, only("end_to_end", memory=memory))
        counts.append(len(runs) // len(layers))
        values.append(values_of(student))
    steps = FAST["end_to_end"]["end_to_end"]["steps"]
    assert counts[1] == counts[0] + steps  # once more in the backward of every step
    assert differing(*values) == []


def test_the_dense_model_runs_once_a_batch(tiny_model, data: Data) -> None:
    student = student_of(tiny_model("llama"))
    count = count_dense_passes(student.model, student.linears[0])
    settings = only("end_to_end")
    teacher = teacher_of(student)
    recover(student, teacher, data, settings)
    assert count["dense"] == len(data.train) + len(data.validation)
    recover(student, teacher, data, settings)
    assert count["dense"] == len(data.train) + len(data.validation)


def coarse(weight: Tensor) -> Tensor:
    """Round to seven levels a row."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-6) / 3
    return (weight / scale).round() * scale


@pytest.mark.parametrize("stage", ["blocks", "end_to_end"])
def test_what_is_learned_under_rounding_loses_less_once_it_is_rounded(
    trained_checkpoint, data: Data, stage: RecoverStage
) -> None:
    losses = []
    for during in (coarse, None):
        model = AutoModelForCausalLM.from_pretrained(trained_checkpoint)
        student = student_of(model, rounding=during)
        (record,) = run(student, data, only(stage))
        assert record.rounded == (during is not None)
        rounded = student_of(model, rounding=coarse)
        rounded.values.update(student.values)
        losses.append(loss_of(rounded, data))
        if during is not None:
            assert losses[-1] == record.validation[1] < record.validation[0]
            assert any(not torch.equal(coarse(v), v) for v in student.values.values())
    assert losses[0] < 0.9 * losses[1]
