# SPDX-License-Identifier: Apache-2.0
"""Steps have the size of the weights, and a rate that rises and falls."""

import pytest
import torch

from nm_permute_plugin.pruning.recover import optimizer
from nm_permute_plugin.pruning.recover.optimizer import RelativeAdamW


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_step_has_the_size_of_the_weights(scale: float) -> None:
    weight = scale * torch.tensor([[3.0, 0.0, -4.0, 0.0]])
    master = weight.clone().requires_grad_(True)
    optimizer = RelativeAdamW({"weight": master}, rate=0.01, steps=9)
    (scale**-1 * master).sum().backward()
    optimizer.step()
    rms = scale * (25 / 2) ** 0.5
    torch.testing.assert_close(
        weight - master.detach(), torch.full((1, 4), 0.01 * rms), rtol=1e-3, atol=0.0
    )
    assert not bool(master.grad.any())


@pytest.mark.parametrize("steps", [3, 40])
def test_steps_rise_for_a_tenth_and_fall_to_nothing(steps: int) -> None:
    master = torch.ones(1, 4, requires_grad=True)
    optimizer = RelativeAdamW({"weight": master}, rate=0.1, steps=steps)
    moved = []
    for _ in range(steps + 1):
        before = master.detach().clone()
        master.sum().backward()
        optimizer.step()
        moved.append(float((before - master.detach()).mean()))
    peak = steps // 10
    assert moved.index(max(moved)) == peak
    assert moved == sorted(moved[:peak]) + sorted(moved[peak:], reverse=True)
    assert moved[0] == pytest.approx(0.1 / (peak + 1), rel=1e-3)
    assert moved[-2] > moved[-1] == 0


def test_a_parameter_of_zeros_stays() -> None:
    master = torch.zeros(3, requires_grad=True)
    optimizer = RelativeAdamW({"bias": master}, rate=0.1, steps=2)
    master.sum().backward()
    optimizer.step()
    assert torch.equal(master.detach(), torch.zeros(3))


def test_steps_are_those_of_adamw_with_a_rate_for_each_parameter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizer, "ELEMENTS", 10)  # two parts
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, n, generator=generator) for n in (2, 1, 4)]
    masters = {str(n): v.clone().requires_grad_(True) for n, v in enumerate(values)}
    ours, again = (RelativeAdamW(masters, rate=0.05, steps=30) for _ in range(2))
    theirs = [value.clone().requires_grad_(True) for value in values]
    sizes = [float(value.square().mean().sqrt()) for value in values]
    adamw = torch.optim.AdamW(
        [{"params": [p], "lr": size} for p, size in zip(theirs, sizes, strict=True)],
        weight_decay=0.0,
    )
    for number in range(12):
        for group, size in zip(adamw.param_groups, sizes, strict=True):
            group["lr"] = ours.rate * size
        for mine, other in zip(masters.values(), theirs, strict=True):
            if number < 3 and other is theirs[1]:
                continue  # as experts that no token has reached yet
            grad = torch.randn(mine.shape, generator=generator)
            mine.grad, other.grad = grad.clone(), grad
        if number == 6:  # as a run that goes on
            again.load_state_dict(ours.state_dict())
            ours = again
        ours.step()
        adamw.step()
    for mine, other in zip(masters.values(), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_a_parameter_without_a_gradient_stays() -> None:
    masters = {name: torch.ones(2, requires_grad=True) for name in ("one", "other")}
    optimizer = RelativeAdamW(masters, rate=0.1, steps=2)
    masters["one"].sum().backward()
    optimizer.step()
    assert torch.equal(masters["other"].detach(), torch.ones(2))
    assert bool((masters["one"] < 1).all())
