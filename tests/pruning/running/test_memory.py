# SPDX-License-Identifier: Apache-2.0
"""What a step keeps is counted, and layers run again where memory is short."""

import pytest
import torch
from learning import as_it_is
from torch import Tensor, nn

from nm_permute_plugin.pruning.data import Batch
from nm_permute_plugin.pruning.learn.loop import Learner
from nm_permute_plugin.pruning.learn.multipliers import ScoreMultipliers
from nm_permute_plugin.pruning.problem import Problem
from nm_permute_plugin.pruning.running import memory
from nm_permute_plugin.pruning.running.masked import frozen
from nm_permute_plugin.pruning.running.memory import (
    activation_bytes,
    checkpointed,
    free_bytes,
    kept_bytes,
    layers_to_checkpoint,
    repeated_layers,
)
from nm_permute_plugin.pruning.settings import LearnSettings, MemorySettings

DOWN = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
BY_MEMORY = MemorySettings()


@pytest.fixture
def problem(tiny_model, make_problem) -> Problem:
    return make_problem(tiny_model("llama"))


@pytest.fixture
def learner(problem: Problem) -> Learner:
    return ScoreMultipliers(problem, as_it_is(problem), LearnSettings(), steps=2)


@pytest.fixture
def batches(tokens: Tensor) -> list[Batch]:
    return [{"input_ids": tokens}, {"input_ids": 47 - tokens}]


def layers(problem: Problem, learner: Learner, batches: list[Batch]) -> list[nn.Module]:
    """Those that are run again where memory decides."""
    with frozen(problem.model):
        return layers_to_checkpoint(problem.teacher, learner.masks, batches, BY_MEMORY)


def test_layers_that_run_again_keep_less(
    problem: Problem, learner: Learner, tokens: Tensor
) -> None:
    def bytes_of(rows: int, settings: MemorySettings = BY_MEMORY) -> int:
        batch = {"input_ids": tokens[:1].repeat(rows, 4)}
        with frozen(problem.model):
            return activation_bytes(problem.teacher, learner.masks, batch, settings)

    whole = bytes_of(4)
    with checkpointed(repeated_layers(problem.model, DOWN)):
        less = bytes_of(4)
    assert 0 < less < whole / 2
    assert whole == pytest.approx(4 * bytes_of(1), rel=0.01)
    assert bytes_of(4, MemorySettings(micro_batch_size=2)) == whole // 2


def test_what_a_pass_keeps_is_counted_once_and_without_parameters() -> None:
    layer = nn.Linear(8, 8)
    x = torch.randn(5, 8, requires_grad=True)

    def forward() -> Tensor:
        middle = layer(x)  # keeps x and the weight
        return (middle * middle).sum()  # keeps the same tensor twice

    assert kept_bytes(layer, forward) == 2 * 5 * 8 * 4


@pytest.mark.parametrize(("wanted", "count"), [(True, 2), (False, 0)])
def test_who_says_so_gets_all_layers_or_none(
    problem: Problem,
    learner: Learner,
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    wanted: bool,
    count: int,
) -> None:
    def refuse(*rest: object) -> int:
        raise AssertionError("nothing needs to be tried")

    monkeypatch.setattr(memory, "activation_bytes", refuse)
    settings = MemorySettings(gradient_checkpointing=wanted)
    found = layers_to_checkpoint(problem.teacher, learner.masks, batches, settings)
    assert found == list(problem.model.model.layers)[:count]


@pytest.mark.parametrize(("free", "count"), [(None, 0), (1 << 40, 0), (1000, 2)])
def test_layers_run_again_where_memory_is_short(
    problem: Problem,
    learner: Learner,
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    count: int,
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert len(layers(problem, learner, batches)) == count


def test_what_the_teacher_will_keep_is_not_free(
    problem: Problem,
    learner: Learner,
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with frozen(problem.model):
        needed = activation_bytes(problem.teacher, learner.masks, batches[0], BY_MEMORY)
    free = 2 * needed + 1  # enough, if the step had it for itself
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert len(layers(problem, learner, batches)) == 2
    for batch in batches:
        assert len(layers(problem, learner, batches)) == 2
        problem.teacher(batch)
    assert layers(problem, learner, batches) == []


def test_only_a_gpu_says_how_much_is_free() -> None:
    assert free_bytes(torch.device("cpu")) is None


def test_lists_without_the_linears_and_lists_inside_of_lists_are_left_out() -> None:
    def layer() -> nn.ModuleDict:
        experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        return nn.ModuleDict({"experts": experts})

    model = nn.ModuleDict(
        {"other": nn.ModuleList([layer()]), "layers": nn.ModuleList([layer(), layer()])}
    )
    assert repeated_layers(model, ["layers.1.experts.0"]) == list(model["layers"])
