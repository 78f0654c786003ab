# SPDX-License-Identifier: Apache-2.0
"""CudaGraphsed calls give what plain calls give."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nm_permute_plugin.pruning.running.cuda_graph import EAGER_CALLS, CudaGraphs

CALLS = EAGER_CALLS + 3

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every captured call, as it is captured; None for those that could not be."""
    found: list[object] = []
    captured = CudaGraphs._captured

    def count(self: CudaGraphs, *rest: object) -> object:
        found.append(captured(self, *rest))
        return found[-1]

    monkeypatch.setattr(CudaGraphs, "_captured", count)
    return found


def test_without_a_gpu_every_call_is_made_with_the_very_arguments() -> None:
    calls: list[tuple[object, ...]] = []
    results: list[Tensor] = []

    def function(*arguments: object) -> Tensor:
        calls.append(arguments)
        results.append(torch.tensor(float(len(calls))))
        return results[-1]

    again = CudaGraphs(function)
    for _ in range(CALLS):
        batch, hidden = {"input_ids": torch.ones(2)}, (torch.zeros(1), torch.ones(1))
        assert again(batch, hidden, False, 0.5) is results[-1]
        first, second, *constants = calls[-1]
        assert first is batch
        assert second is hidden
        assert constants == [False, 0.5]
    assert len(calls) == CALLS


@pytest.mark.gpu
@on_a_gpu
def test_a_captured_call_follows_what_it_reads(graphs: list[object]) -> None:
    """New arguments, and what is changed in place between calls."""
    runs: list[bool] = []
    weight = torch.ones(3, device="cuda", requires_grad=True)

    def function(batch: dict[str, Tensor], share: float) -> Tensor:
        runs.append(True)
        value = share * (batch["x"] * weight.square()).sum()
        value.backward()
        return value.detach()

    again = CudaGraphs(function)
    for call in range(CALLS):
        with torch.no_grad():
            weight.fill_(call + 1)
        x = torch.full((3,), 2.0 + call, device="cuda")
        value = float(again({"x": x}, 0.5))
        assert value == pytest.approx(1.5 * (2 + call) * (call + 1) ** 2)
        expected = torch.full_like(x, (2.0 + call) * (call + 1))
        torch.testing.assert_close(weight.grad, expected)
        weight.grad.zero_()
    assert len(runs) == EAGER_CALLS + 1  # and once to be captured
    assert len(graphs) == 1
    assert None not in graphs


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(
    "change",
    [
        lambda x, share: (torch.cat([x, x]), share),
        lambda x, share: (x.double(), share),
        lambda x, share: (x, 2 * share),
    ],
    ids=["shape", "dtype", "constant"],
)
def test_what_a_capture_took_for_granted_is_captured_anew(
    graphs: list[object], change: Callable
) -> None:
    again = CudaGraphs(lambda x, share: share * x.sum())
    plain = (torch.ones(3, device="cuda"), 0.5)
    for x, share in [plain, change(*plain)] * CALLS:
        assert float(again(x, share)) == share * float(x.sum())
    assert len(graphs) == 2
    assert None not in graphs


@pytest.mark.gpu
@on_a_gpu
def test_what_cannot_be_captured_is_called_as_ever(graphs: list[object]) -> None:
    def function(x: Tensor) -> Tensor:
        return x * x.sum().item()  # waits for the GPU

    again = CudaGraphs(function)
    for call in range(CALLS):
        x = torch.full((3,), 1.0 + call, device="cuda")
        assert torch.equal(again(x), x * 3 * (1 + call))
    assert graphs == [None]
