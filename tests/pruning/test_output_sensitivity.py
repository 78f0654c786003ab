# SPDX-License-Identifier: Apache-2.0
"""The sensitivity of an output is how far its errors move the predictions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nm_permute_plugin.pruning import statistics
from nm_permute_plugin.pruning.statistics import output_sensitivity


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    """Forty rows of twelve tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(48, (40, 12), generator=generator)
    return [{"input_ids": part} for part in ids.split(8)]


def names_of(model: nn.Module) -> list[str]:
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [name for name in linears if name != "lm_head"]


def divergence_of_nudges(
    model: nn.Module, name: str, batches: list[dict[str, Tensor]], size: float
) -> Tensor:
    """How far the predictions move when one output after the other is off everywhere."""
    module = model.get_submodule(name)
    moved = []
    ids = torch.cat([batch["input_ids"] for batch in batches])[:32]
    with torch.no_grad():
        dense = F.log_softmax(model(input_ids=ids).logits.double(), -1)
        for row in range(module.weight.shape[0]):
            generator = torch.Generator().manual_seed(row)
            signs = torch.randn(*ids.shape, generator=generator).sign() * size

            def nudge(module, inputs, out, row=row, signs=signs):
                out = out.clone()
                out[..., row] += signs
                return out

            hook = module.register_forward_hook(nudge)
            ours = F.log_softmax(model(input_ids=ids).logits.double(), -1)
            hook.remove()
            moved.append((dense.exp() * (dense - ours)).sum())
    return torch.stack(moved)


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]
)
def test_outputs_are_as_sensitive_as_their_errors_cost(
    tiny_model, batches, name: str
) -> None:
    model = tiny_model("llama").double().eval()
    sensitivity = output_sensitivity(model, names_of(model), batches, seed=0)[name]
    cost = divergence_of_nudges(model, name, batches, 1e-3).sqrt()
    # A single draw a token is noisy; costs differ by far more.
    assert float(torch.corrcoef(torch.stack([sensitivity.double(), cost]))[0, 1]) > 0.8
    assert float(cost.max() / cost.min()) > 1.5


def test_they_are_relative_to_all_outputs(tiny_model, batches) -> None:
    model = tiny_model("llama").eval()
    sensitivity = output_sensitivity(model, names_of(model), batches, seed=0)
    every = torch.cat(list(sensitivity.values()))
    assert set(sensitivity) == set(names_of(model))
    assert float(every.square().mean()) == pytest.approx(1, rel=1e-4)


def test_the_same_seed_gives_the_same_sensitivity(tiny_model, batches) -> None:
    model = tiny_model("llama").eval()
    one, same, other = (
        output_sensitivity(model, names_of(model), batches, seed) for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_model_is_left_as_it_was(tiny_model, batches) -> None:
    model = tiny_model("llama").eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    output_sensitivity(model, names_of(model), batches, seed=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    assert [m for m in model.modules() if m._forward_hooks] == []


@pytest.mark.parametrize(
    ("samples", "tokens", "expected"), [(5, 1 << 13, 5), (100, 30, 3)]
)
def test_only_the_first_samples_are_used(
    tiny_model, batches, monkeypatch, samples: int, tokens: int, expected: int
) -> None:
    monkeypatch.setattr(statistics, "MOST_SAMPLES", samples)
    monkeypatch.setattr(statistics, "MOST_TOKENS", tokens)
    model = tiny_model("llama").eval()
    seen: list[int] = []
    count: Callable[..., None] = lambda module, inputs, out: seen.append(len(out))  # noqa: E731
    hook = model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(
        count
    )
    output_sensitivity(model, names_of(model), batches, seed=0)
    hook.remove()
    assert seen == [1] * expected


def test_what_is_padding_does_not_count(tiny_model, batches) -> None:
    model = tiny_model("llama").eval()
    ids = batches[0]["input_ids"]
    padded = F.pad(ids, (0, 4), value=7)
    mask = F.pad(torch.ones_like(ids), (0, 4))
    plain = output_sensitivity(model, names_of(model), [{"input_ids": ids}], 0)
    batch = {"input_ids": padded, "attention_mask": mask}
    other = output_sensitivity(model, names_of(model), [batch], 0)
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-3, atol=1e-4)


def test_a_linear_that_nothing_reaches_is_the_least_sensitive(
    tiny_model, batches
) -> None:
    model = tiny_model("llama").eval()
    model.spare = nn.Linear(8, 4)
    sensitivity = output_sensitivity(model, names_of(model), batches, seed=0)
    assert torch.equal(sensitivity["spare"], torch.full((4,), statistics.FLOOR**0.5))
