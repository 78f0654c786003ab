# SPDX-License-Identifier: Apache-2.0
"""Rebuilding layers regains what was lost, never loses on validation rows, and repeats."""

import pytest
import torch
from recovery import differing, planted, student_of, values_of
from transformers import AutoModelForCausalLM

from nm_permute_plugin.pruning.data import Data, split_text
from nm_permute_plugin.pruning.recover.blocks import rebuild_blocks
from nm_permute_plugin.pruning.recover.student import Student, Values
from nm_permute_plugin.pruning.running.loss import relative_error
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.search import History
from nm_permute_plugin.pruning.settings import BlockSettings, LossSettings

SETTINGS = BlockSettings(epochs=6, rate=0.05)


def rebuild(
    student: Student, data: Data, seed: int = 0, **changes: object
) -> tuple[Values, History]:
    settings = SETTINGS.model_copy(update=changes)
    return rebuild_blocks(student, data, settings, seed)


@pytest.fixture
def data(chain_rows) -> Data:
    return split_text(list(chain_rows(40, 24, seed=1)), 4, validation_share=0.2, seed=0)


def test_the_error_is_relative_to_each_token_and_skips_padding() -> None:
    theirs = torch.tensor([[[3.0, 4.0], [0.0, 1000.0], [9.0, 9.0]]])
    ours = torch.tensor([[[3.0, 3.0], [0.0, 500.0], [0.0, 0.0]]])
    counted = torch.tensor([[True, True, False]])
    error = float(relative_error(ours, theirs, counted))
    assert error == pytest.approx((1 / 25 + 1 / 4) / 2)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_most_of_a_planted_loss_is_regained(
    tiny_model, data: Data, window: int, architecture: str
) -> None:
    student = planted(tiny_model(architecture))
    values, history = rebuild(student, data, window=window)
    assert [entry["layer"] for entry in history] == list(range(0, 2, window))
    assert history[-1]["after"] < 0.5 * history[-1]["before"]
    teacher = Teacher(student.model, LossSettings())
    lost = teacher.validate(student.masks(), data.validation)
    left = teacher.validate(student.masks(values), data.validation)
    assert left < 0.5 * lost


def test_a_later_layer_corrects_the_errors_of_an_earlier_one(
    tiny_model, data: Data
) -> None:
    model = tiny_model("llama")
    student = student_of(model, only="layers.1.")
    with torch.no_grad():
        for name, value in student.values.items():
            model.get_parameter(name).copy_(value)  # layer 1 loses nothing by its masks
    student = student_of(model, only="down_proj")
    student.values["model.layers.0.mlp.down_proj.weight"].zero_()  # what is 0 stays 0
    _, (first, second) = rebuild(student, data)
    assert first["before"] == first["after"] > 0.01
    assert second["after"] < 0.9 * second["before"]


@pytest.mark.parametrize("rate", [0.01, 50.0], ids=["good", "far too high"])
def test_no_window_is_worse_on_validation_rows(
    trained_checkpoint, data: Data, rate: float
) -> None:
    student = student_of(AutoModelForCausalLM.from_pretrained(trained_checkpoint))
    values, history = rebuild(student, data, rate=rate)
    assert all(entry["after"] <= entry["before"] for entry in history)
    better = [entry["layer"] for entry in history if entry["after"] < entry["before"]]
    changed = {int(name.split(".")[2]) for name in values}
    assert changed == set(better)
    assert better == ([0, 1] if rate == 0.01 else [])


def test_the_kept_weights_change_only_when_taken(tiny_model, data: Data) -> None:
    model = tiny_model("llama")
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    student = student_of(model)
    before = values_of(student)
    values, _ = rebuild(student, data)
    assert differing(before, student.values) == []
    assert differing(before, {**before, **values}) != []
    now = {name: p.detach() for name, p in model.named_parameters()}
    assert differing(dense, now) == []
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zeros_stay_and_the_seed_decides(
    tiny_model, data: Data, dtype: torch.dtype
) -> None:
    runs = []
    for seed in (1, 1, 2):
        student = student_of(tiny_model("llama", dtype=dtype))
        values, history = rebuild(student, data, seed=seed)
        assert history[0]["after"] < history[0]["before"]
        for name, value in values.items():
            assert value.dtype == dtype
            assert torch.equal(value == 0, student.values[name] == 0)
        runs.append(values)
    first, again, other = runs
    assert differing(first, again) == []
    assert differing(first, other) != []


def test_padding_is_not_learned_from(tiny_model, chain_rows) -> None:
    rows = chain_rows(12, 24, seed=1)
    short = Data([{"input_ids": rows[:8, :16]}], [{"input_ids": rows[8:, :16]}])
    mask = torch.ones_like(rows)
    mask[:, 16:] = 0
    padded = Data(
        [{"input_ids": rows[:8], "attention_mask": mask[:8]}],
        [{"input_ids": rows[8:], "attention_mask": mask[8:]}],
    )
    runs = [
        rebuild(student_of(tiny_model("llama")), data)[1] for data in (short, padded)
    ]
    for first, second in zip(*runs, strict=True):
        assert first == pytest.approx(second, rel=1e-3)


def test_layers_without_pruned_linears_are_passed_through(
    tiny_model, data: Data
) -> None:
    student = student_of(tiny_model("llama"), only="layers.1.mlp")
    values, history = rebuild(student, data)
    assert history[0] == {"layer": 0, "before": 0.0, "after": 0.0}
    assert history[1]["after"] < history[1]["before"]
    assert all("layers.1.mlp" in name for name in values)


def test_activations_that_are_not_finite_are_refused(tiny_model, data: Data) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the validation error of a layer is nan"):
        rebuild(student_of(model, only="layers.0."), data)
