# SPDX-License-Identifier: Apache-2.0
"""What a run is expected to take, and what it does not fit into."""

from collections.abc import Callable, Mapping

import pytest
import torch
from transformers import PreTrainedModel

from nm_permute_plugin._words import memory_size
from nm_permute_plugin.pruning.budget.choice import turns, validations
from nm_permute_plugin.pruning.budget.shares import POINTS
from nm_permute_plugin.pruning.data import Data, split_text
from nm_permute_plugin.pruning.estimate.amounts import Amounts
from nm_permute_plugin.pruning.estimate.meter import Meter
from nm_permute_plugin.pruning.estimate.probe import Estimate, estimate
from nm_permute_plugin.pruning.estimate.room import DoesNotFit, Room
from nm_permute_plugin.pruning.pipeline import permute_and_prune
from nm_permute_plugin.pruning.problem import Problem
from nm_permute_plugin.pruning.run import PrunePlan
from nm_permute_plugin.pruning.running.backward import Backward
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import Settings

CPU = torch.device("cpu")
SHORT = {"batch_size": 4, "learn": {"steps": 7}, "search": {"rounds": 4}}
SHORT |= {"validation": {"every": 3}}


@pytest.fixture
def rows(chain_rows) -> list[torch.Tensor]:
    return list(chain_rows(24, 32, seed=1))


def data_of(rows: list[torch.Tensor], settings: Settings) -> Data:
    share = settings.validation.share
    return split_text(rows, settings.batch_size, share, settings.seed)


def estimated(
    model: PreTrainedModel,
    rows: list[torch.Tensor],
    fields: Mapping[str, object],
    **options: object,
) -> Estimate:
    settings = Settings.model_validate(fields)
    plan = PrunePlan.of(model, settings)
    return estimate(model, plan, data_of(rows, settings), settings, **options)


def bits(model: PreTrainedModel) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.state_dict().values()]


@pytest.mark.parametrize(
    ("fields", "stages"),
    [
        ({"method": "identity"}, []),
        ({"method": "search"}, ["search"]),
        ({"method": "identity", "budget": {"max_loss_increase": 1}}, ["budget"]),
        (SHORT | {"budget": {"dense_share": 0.3}}, ["search", "budget", "learn"]),
        (SHORT, ["search", "learn"]),
        (SHORT | {"memory": {"micro_batch_size": 1}}, ["search", "learn"]),
        (
            {"learn": {"stages": ["swaps", "multipliers"], "steps": 2}}
            | {"objective": "layer_wise", "batch_size": 4},
            ["search", "learn"],
        ),
        (
            {"method": "identity", "recover": ["rescale", "blocks", "end_to_end"]},
            ["recover"],
        ),
    ],
    ids=["identity", "search", "budget", "learned in a budget", "learned"]
    + ["micro-batches", "layer-wise", "recover"],
)
def test_every_stage_has_its_time_and_memory_and_the_model_stays(
    tiny_model, rows, fields, stages
) -> None:
    model = tiny_model("llama").train()
    before = bits(model)
    found = estimated(model, rows, fields)
    ends = ["fold and prune", "save"]
    assert [stage.name for stage in found.stages] == ["statistics", *stages, *ends]
    for stage in found.stages:
        assert stage.took.seconds > 0
        # The memory of a process may shrink a little between two looks.
        assert stage.peak >= 0.99 * found.held > 0
    assert found.took.seconds >= max(stage.took.seconds for stage in found.stages)
    assert found.peak == max(stage.peak for stage in found.stages)
    assert found.unfit == []
    assert bits(model) == before
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_more_steps_take_longer(tiny_model, rows) -> None:
    def learning(steps: int) -> float:
        fields = SHORT | {"learn": {"steps": steps}}
        found = estimated(tiny_model("llama"), rows, fields)
        return next(s.took.seconds for s in found.stages if s.name == "learn")

    assert learning(5000) > 10 * learning(5)


@pytest.mark.parametrize(
    "budget", [{}, {"dense_share": 0.3}, {"max_loss_increase": 0.2}]
)
def test_the_run_validates_and_steps_as_often_as_was_counted(
    tiny_model, rows, monkeypatch, budget
) -> None:
    recover = {"stages": ["end_to_end"], "end_to_end": {"steps": 5}}
    fields = SHORT | {"recover": recover, "budget": budget}
    settings = Settings.model_validate(fields)
    data, model = data_of(rows, settings), tiny_model("llama")
    plan = PrunePlan.of(model, settings)
    amounts = Amounts(data, settings)
    spaces = Problem.prepare(model, plan.resolved, plan.prunable, data, settings).spaces
    counts = {"validate": 0, "__call__": 0}

    def counting(kind: type, name: str) -> None:
        own: Callable[..., object] = getattr(kind, name)

        def counted(*arguments: object, **options: object) -> object:
            counts[name] += 1
            return own(*arguments, **options)

        monkeypatch.setattr(kind, name, counted)

    counting(Teacher, "validate")
    counting(Backward, "__call__")
    record = permute_and_prune(model, plan.resolved, plan.prunable, data, settings)
    of_search = amounts.search_validations(spaces)
    of_learning = 1 + amounts.validations(amounts.steps)
    of_recovery = 2 + 1 + amounts.validations(5)  # the whole twice, and distill's own
    learnings, most, gradients = turns(settings), 0, 0
    if record.budget is not None:
        assert len(record.budget.learned) == learnings
        most = validations(len(record.budget.groups), settings)
        gradients = POINTS * len(data.validation) * learnings
    of_budget = counts["validate"] - of_search - learnings * of_learning - of_recovery
    assert 0.6 * most <= of_budget <= most  # points of the curve may be the choice
    assert counts["__call__"] == learnings * amounts.steps + 5 + gradients


def test_rows_of_many_lengths_are_counted_by_their_tokens(chain_rows) -> None:
    long, short = list(chain_rows(4, 32, seed=1)), list(chain_rows(12, 8, seed=2))
    settings = Settings(batch_size=1)
    data = Data(
        [{"input_ids": row[None]} for row in long + short],
        [{"input_ids": row[None]} for row in short[:2]],
    )
    amounts = Amounts(data, settings)
    assert amounts.batch["input_ids"].shape == (1, 32)
    assert amounts.train_batches == 4 + 12 / 4
    assert amounts.per_step == 7 / 16
    assert amounts.validation_batches == 2


def room(
    model: PreTrainedModel,
    rows: list[torch.Tensor],
    fields: Mapping[str, object],
    free: int,
) -> Room:
    """A device that only says that it has so many bytes free."""
    settings = Settings.model_validate(fields)
    prunable, data = PrunePlan.of(model, settings).prunable, data_of(rows, settings)
    return Room.of(model, prunable, data, settings, Meter(CPU), lambda device: free)


def test_a_stage_that_does_not_fit_is_refused_with_what_would_fit(
    tiny_model, rows
) -> None:
    model = tiny_model("llama")
    least = room(model, rows, {"batch_size": 8}, 0).least("learn")
    with pytest.raises(DoesNotFit) as refused:
        room(model, rows, {"batch_size": 8}, least - 1).check("learn")
    said = str(refused.value)
    assert said.startswith("learn needs ")
    for remedy in ("memory: {micro_batch_size: 1}", "objective: layer_wise", "more"):
        assert remedy in said
    for changed in (
        {"batch_size": 8, "memory": {"micro_batch_size": 1}},
        {"batch_size": 8, "objective": "layer_wise"},
    ):
        room(model, rows, changed, least - 1).check("learn")
    room(model, rows, {"batch_size": 8}, least).check("learn")


def test_only_what_would_be_enough_is_offered(tiny_model, rows) -> None:
    with pytest.raises(DoesNotFit) as refused:
        room(tiny_model("llama"), rows, {"batch_size": 8}, 1).check("learn")
    assert "micro_batch_size" not in str(refused.value)
    assert "use a device with" in str(refused.value)


def test_a_distillation_needs_more_than_the_masks_alone(tiny_model, rows) -> None:
    model = tiny_model("llama")
    fields = {"recover": ["end_to_end"], "memory": {"micro_batch_size": 1}}
    distils = room(model, rows, fields, 1 << 40)
    rebuilds = room(model, rows, {"recover": ["blocks"]}, 1 << 40)
    assert distils.least("recover") > rebuilds.least("recover")
    with pytest.raises(DoesNotFit, match="leave end_to_end out of `recover`"):
        room(model, rows, fields, distils.least("recover") - 1).check("recover")


def test_nothing_is_measured_where_nothing_fits(tiny_model, rows) -> None:
    model = tiny_model("llama")
    before = bits(model)
    found = estimated(model, rows, SHORT, free=lambda device: 0)
    assert found.stages == []
    assert len(found.unfit) == 1
    assert found.unfit[0].startswith("statistics needs ")
    assert bits(model) == before


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...", 20 << 30),
        ("DefaultCPUAllocator: can't allocate: you tried to allocate 512 bytes.", 512),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", 1),
    ],
)
def test_a_failure_to_allocate_is_a_refusal(
    tiny_model, rows, message: str, asked: int
) -> None:
    at = room(tiny_model("llama"), rows, SHORT, 1 << 40)
    with pytest.raises(DoesNotFit) as refused, at.caught("learn"):
        raise RuntimeError(message)
    said = f"learn needs at least {memory_size((1 << 40) + asked)}"
    assert str(refused.value).startswith(said)
    with pytest.raises(RuntimeError, match="another"), at.caught("learn"):
        raise RuntimeError("another error")
