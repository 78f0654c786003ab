# SPDX-License-Identifier: Apache-2.0
"""Where nothing of ours can run a layer stays dense, and says why."""

import logging
from collections.abc import Iterator

import pytest
import torch
from weights import (
    BOUND,
    DTYPES,
    error,
    exact,
    scales_for,
    sparse_weight,
)

from nm_permute_plugin.serving import linear
from nm_permute_plugin.serving.kernel_table import Bucket, Plan, Way
from nm_permute_plugin.serving.linear import SparseLinear
from nm_permute_plugin.serving.ops import KERNELS, PLANS, sparse24_linear
from nm_permute_plugin.serving.tune import sample

DENSE = Way("dense", (), 1.0)


@pytest.fixture
def dense_plan() -> Iterator[str]:
    """The name of a plan that always takes the dense kernel, which runs anywhere."""
    PLANS["dense"] = Plan(16, [Bucket(8, DENSE, [DENSE])])
    yield "dense"
    del PLANS["dense"]


def test_without_a_gpu_the_first_layer_is_named_with_the_reason_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_TOLD", set())
    weight = sparse_weight(32, 128, torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        for name in ("model.layers.0.mlp", "model.layers.1.mlp"):
            assert SparseLinear.prepare(name, weight, "auto") is None
    (message,) = caplog.messages
    assert message.startswith("model.layers.0.mlp stays dense")
    assert "it is on cpu; the sparse kernels need a CUDA device" in message


def test_dense_mode_leaves_the_layer_alone() -> None:
    assert (
        SparseLinear.prepare("a", sparse_weight(32, 128, torch.int8), "dense") is None
    )


def test_an_unknown_kernel_in_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(linear.FORCED, "cutlass")
    with pytest.raises(
        ValueError, match="NM_PERMUTE_KERNEL=cutlass names cutlass; known"
    ):
        linear._allowed(sparse_weight(32, 128, torch.int8), "auto")


@pytest.mark.parametrize("name", sorted(set(KERNELS) - {"dense"}))
def test_sparse_kernels_refuse_the_cpu(name: str) -> None:
    refusal = KERNELS[name].refusal(sparse_weight(32, 128, torch.bfloat16))
    assert refusal == "no CUDA device"


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernels_refuse_unknown_dtypes(name: str) -> None:
    refusal = KERNELS[name].refusal(torch.zeros(32, 128, dtype=torch.float32))
    known = "torch.float32 has no kernel; these have: bfloat16, float16"
    assert refusal is not None
    assert refusal.startswith(known)


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8"])
def test_a_layer_runs_compiled_and_not(kind: str, tokens: int, dense_plan: str) -> None:
    """The CPU has no float8 product."""
    weight = sparse_weight(16, 64, DTYPES[kind])
    x = sample(weight, tokens)
    scales = scales_for(weight, tokens, bias=True) if kind == "int8" else None
    layer = SparseLinear(weight, PLANS[dense_plan], dense_plan)
    torch.compiler.reset()

    def call(x: torch.Tensor) -> torch.Tensor:
        return layer(x) if scales is None else layer.scaled_mm(x, *scales)

    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        out = run(x)
        assert out.shape == (tokens, 16)
        assert out.dtype == (scales.out_dtype if scales else x.dtype)
        if tokens:
            assert error(out, exact(weight, x, scales)) < BOUND


def test_a_layer_compiles_whole_for_all_numbers_of_tokens(dense_plan: str) -> None:
    weight = sparse_weight(16, 64, torch.bfloat16)
    layer = SparseLinear(weight, PLANS[dense_plan], dense_plan)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: layer(x) + 1, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for tokens in (2, 5, 9):
        x = sample(weight, tokens)
        torch._dynamo.mark_dynamic(x, 0)  # an error where a graph is for one number
        assert error(compiled(x), exact(weight, x) + 1) < BOUND


def test_a_compiled_graph_is_for_a_plan_and_for_our_source(
    dense_plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = sparse_weight(16, 64, torch.bfloat16)
    layer = SparseLinear(weight, PLANS[dense_plan], dense_plan)
    before = layer.signature
    assert before.startswith("dense: dense, ")
    monkeypatch.setattr(linear.plans, "digest", lambda folder: "of another source")
    assert layer.signature == "dense: dense, of another source"
    assert before != layer.signature


def test_the_operators_schema_and_fake_hold(dense_plan: str) -> None:
    weight = sparse_weight(16, 64, torch.bfloat16)
    arguments = (sample(weight, 3), [weight], dense_plan)
    torch.library.opcheck(
        sparse24_linear, arguments, test_utils=("test_schema", "test_faketensor")
    )
