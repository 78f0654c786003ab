# SPDX-License-Identifier: Apache-2.0
"""On a CPU that is slow in 16 bits, work is done in float32; weights keep their dtype."""

from types import SimpleNamespace

import pytest
import torch
from helpers import ours
from transformers import AutoModelForCausalLM

from nm_permute_plugin.pruning import problem
from nm_permute_plugin.pruning.running import fast_dtype
from nm_permute_plugin.pruning.running.fast_dtype import computing_fast
from nm_permute_plugin.pruning.statistics import input_norms


@pytest.fixture
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured on a CPU without instructions for 16 bits."""
    monkeypatch.setattr(fast_dtype, "_times_as_long", lambda dtype: 7.0)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_in_float32_and_come_back_bit_for_bit(
    slow_cpu, tiny_model, dtype: torch.dtype
) -> None:
    model = tiny_model("llama").to(dtype)
    model.register_buffer("wide", torch.rand(3))  # was float32, and stays so
    before = weights(model)
    with computing_fast(model):
        assert {t.dtype for t in weights(model).values()} == {torch.float32}
    after = weights(model)
    assert {n: t.dtype for n, t in after.items()} == {
        n: t.dtype for n, t in before.items()
    }
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_weights_come_back_after_an_error(slow_cpu, tiny_model) -> None:
    model = tiny_model("llama").bfloat16()
    with pytest.raises(ZeroDivisionError), computing_fast(model):
        _ = 1 // 0
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_where_memory_is_short_nothing_changes(
    slow_cpu, tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = SimpleNamespace(available=1000)
    monkeypatch.setattr(fast_dtype.psutil, "virtual_memory", lambda: little)
    model = tiny_model("llama").bfloat16()
    with computing_fast(model):
        assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_cpu_that_is_fast_in_16_bits_uses_them(
    tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_dtype, "_times_as_long", lambda dtype: 0.6)
    model = tiny_model("llama").bfloat16()
    with computing_fast(model):
        assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_whole_run_leaves_16_bit_weights(slow_cpu, tiny_model, go) -> None:
    model = tiny_model("llama").bfloat16()
    before = model.model.layers[0].mlp.gate_proj.weight.detach().float()
    go(model, method="identity")
    after = model.model.layers[0].mlp.gate_proj.weight
    assert after.dtype == torch.bfloat16
    kept = after.float() != 0
    assert float(kept.float().mean()) == 0.5
    assert torch.equal(after.float()[kept], before[kept])


def test_oneshot_computes_in_float32_too(
    slow_cpu, tiny_checkpoint, run_oneshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def watched(model: torch.nn.Module, *rest: object) -> object:
        seen.append(next(model.parameters()).dtype)
        return input_norms(model, *rest)

    monkeypatch.setattr(problem, "input_norms", watched)
    folder = tiny_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    pruned = run_oneshot(folder, ours(method="identity"))
    assert seen == [torch.float32]
    assert pruned.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_the_probe_measures_this_cpu() -> None:
    assert 0.01 < fast_dtype._times_as_long(torch.bfloat16) < 1000
    assert fast_dtype._times_as_long(torch.float32) < 100
