# SPDX-License-Identifier: Apache-2.0
"""A step in parts, or with layers run again in backward, has the gradients of the whole."""

from collections.abc import Callable

import pytest
import torch
from learning import as_it_is, leaves
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nm_permute_plugin.pruning.learn.loop import LEARNERS, Learner
from nm_permute_plugin.pruning.problem import Problem
from nm_permute_plugin.pruning.running import backward
from nm_permute_plugin.pruning.running.backward import Backward
from nm_permute_plugin.pruning.running.cuda_graph import CudaGraphs, _kind
from nm_permute_plugin.pruning.running.masked import frozen
from nm_permute_plugin.pruning.settings import (
    LearnSettings,
    LossSettings,
    MemorySettings,
)

LOSS = LossSettings(divergence=1.0, hidden=0.5)


@pytest.fixture
def problem(tiny_model, make_problem) -> Problem:
    return make_problem(tiny_model("llama"), loss=LOSS)


@pytest.fixture(params=["multipliers", "swaps"])
def learner(request, problem: Problem) -> Learner:
    settings = LearnSettings(stages=(request.param,), steps=2)
    return LEARNERS[request.param](problem, as_it_is(problem), settings, 2)


@pytest.fixture
def gradients(
    problem: Problem, learner: Learner
) -> Callable[..., tuple[float, list[Tensor]]]:
    """A factory: the loss of a step and the gradients that it leaves."""

    def step(batch: dict[str, Tensor], **memory) -> tuple[float, list[Tensor]]:
        with frozen(problem.model), torch.enable_grad():
            run = Backward(
                problem.teacher,
                learner.masks,
                learner.parameters,
                [batch],
                MemorySettings(**memory),
                learner.use_graph,
            )
            value = run(batch, lambda: learner.prepare(1))
        found = []
        for parameter in leaves(learner):
            found.append(parameter.grad.clone())
            parameter.grad = None
        assert found
        return value, found

    return step


@pytest.fixture(params=["whole", "padded"])
def batch(request, tokens: Tensor) -> dict[str, Tensor]:
    """Three rows of twelve tokens, or of twelve, seven and twelve."""
    if request.param == "whole":
        return {"input_ids": tokens}
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_parts_add_up_to_the_batch(gradients, batch, size: int) -> None:
    value, whole = gradients(batch)
    in_parts, parts = gradients(batch, micro_batch_size=size)
    assert in_parts == pytest.approx(value, rel=1e-5)
    for found, expected in zip(parts, whole, strict=True):
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_layers_that_run_again_leave_the_same_gradients(
    problem: Problem, gradients, batch
) -> None:
    model = problem.model
    value, plain = gradients(batch)
    runs: list[nn.Module] = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(
            lambda module, *rest: runs.append(module)
        )
    again, checkpointed = gradients(batch, gradient_checkpointing=True)
    assert again == value
    for found, expected in zip(checkpointed, plain, strict=True):
        assert torch.equal(found, expected)
    # The dense model once, the pruned one forward and again in backward.
    assert len(runs) == 3 * len(model.model.layers)
    assert [m for m in model.modules() if "forward" in m.__dict__] == []


def test_parts_with_other_shares_of_the_tokens_are_one_graph(
    gradients, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a captured graph takes for granted of the arguments is the same for all."""
    calls: list[tuple[object, ...]] = []

    class Watched(CudaGraphs):
        def __call__(self, *arguments: object) -> Tensor:
            calls.append(tuple(_kind(leaf) for leaf in tree_leaves(arguments)))
            return super().__call__(*arguments)

    monkeypatch.setattr(backward, "CudaGraphs", Watched)
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    padded = {"input_ids": tokens, "attention_mask": mask}
    gradients(padded, micro_batch_size=1)
    assert len(calls) == 3
    assert len(set(calls)) == 1
