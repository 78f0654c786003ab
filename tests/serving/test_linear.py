# SPDX-License-Identifier: Apache-2.0
"""Where nothing of ours can run a layer stays dense, and says why."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import torch
from torch import Tensor
from weights import (
    BOUND,
    DTYPES,
    error,
    exact,
    scales_for,
    sparse_weight,
)

from nm_permute_plugin.checkpoint import codec
from nm_permute_plugin.serving import kernel_table, linear
from nm_permute_plugin.serving.kernel_table import BUCKETS, Bucket, Choice, KernelTable
from nm_permute_plugin.serving.kernels.dense import Dense
from nm_permute_plugin.serving.linear import SparseLinear
from nm_permute_plugin.serving.measuring import Asked, Measured
from nm_permute_plugin.serving.ops import KERNELS, TABLES, sparse24_linear
from nm_permute_plugin.serving.tune import random_tokens

DENSE = Choice("dense", (), 1.0)


@pytest.fixture
def dense_table() -> Iterator[str]:
    """The name of a table that always takes the dense kernel, which runs anywhere."""
    TABLES["dense"] = KernelTable(16, [Bucket(8, DENSE, [DENSE])])
    yield "dense"
    del TABLES["dense"]


def test_another_weight_is_filled_in_where_the_first_was(dense_table: str) -> None:
    first, other = (
        sparse_weight(16, 32, torch.bfloat16) * factor for factor in (1.0, 2.0)
    )
    layer = SparseLinear(first, dense_table)
    places = [packed.data_ptr() for packed in layer.packed]
    x = random_tokens(first, 3)
    before = layer(x)
    layer.refill(SparseLinear(other, dense_table))
    assert [packed.data_ptr() for packed in layer.packed] == places
    assert torch.equal(layer(x), 2 * before)


def test_without_a_gpu_the_reason_is_given() -> None:
    weight = sparse_weight(32, 128, torch.bfloat16)
    reason = SparseLinear.prepare(weight, "auto")
    assert reason == "it is on cpu; the sparse kernels need a CUDA device"


def test_dense_mode_leaves_the_layer_alone() -> None:
    weight = sparse_weight(32, 128, torch.int8)
    assert SparseLinear.prepare(weight, "dense") == "the mode is dense"


@dataclass(frozen=True)
class OnCpu(Dense):
    """A kernel that passes for a sparse one."""

    name: str = "cusparselt"


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    """Makes a weight one on a GPU, for which a kernel table is known and runs."""
    kernels = {"dense": Dense(), "cusparselt": OnCpu()}
    monkeypatch.setattr(linear, "KERNELS", kernels)
    monkeypatch.setattr(linear, "TABLES", {})
    choice = Choice("cusparselt", (), 1.0)

    def pretended(weight: Tensor) -> Tensor:
        name = f"{tuple(weight.shape)} {weight.dtype} dense cusparselt"
        linear.TABLES[name] = KernelTable(len(weight), [Bucket(8, choice, [])])
        return weight.as_subclass(OnGpu)

    return pretended


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_a_weight_that_is_not_2of4_stays_dense_and_says_where(
    pretended_gpu: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "_in_triton", lambda words: False)
    reason = SparseLinear.prepare(pretended_gpu(torch.ones(16, 64)), "auto")
    assert "float32 has no kernel" in str(reason)
    weight = torch.ones(16, 64, dtype=torch.bfloat16)
    reason = SparseLinear.prepare(pretended_gpu(weight), "auto")
    assert "is not 2:4 sparse: row 0, channels 0..3 hold 4 non-zeros" in str(reason)


def test_a_weight_that_was_checked_is_not_compressed_for_a_check_again(
    pretended_gpu: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Tensor] = []
    monkeypatch.setattr(linear, "compress", checked.append)
    weight = pretended_gpu(sparse_weight(16, 64, torch.bfloat16))
    assert isinstance(SparseLinear.prepare(weight, "auto"), SparseLinear)
    assert len(checked) == 1
    layer = SparseLinear.prepare(weight, "auto", is_checked=True)
    assert isinstance(layer, SparseLinear)
    assert len(checked) == 1


def dense_for_all(rows: int) -> KernelTable:
    """A table that chooses the dense kernel for every number of tokens."""
    return KernelTable(rows, [Bucket(tokens, DENSE, [DENSE]) for tokens in BUCKETS])


def measuring(
    table: KernelTable, calls: list[dict[str, Asked]] | None = None
) -> Callable[[dict[str, Asked], torch.device, object], Measured]:
    """A stand-in for the process that measures: it finds one table for all weights."""

    def stand_in(
        asked: dict[str, Asked], device: torch.device, process: object
    ) -> Measured:
        assert process in (None, "a process")
        if calls is not None:
            calls.append(asked)
        return Measured(dict.fromkeys(asked, table), {}, {}, {})

    return stand_in


def test_a_kept_table_that_does_not_run_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, bad = tmp_path / "table.json", Choice("dense", (7,), 1.0)
    kernel_table.save(KernelTable(16, [Bucket(8, bad, [bad])]), path)
    monkeypatch.setattr(kernel_table, "path_of", lambda weight, allowed: path)
    measured = dense_for_all(16)
    monkeypatch.setattr(linear, "measure", measuring(measured))
    weight = sparse_weight(16, 64, torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        assert linear._table(weight, ["dense"]) == measured
    assert f"ignored the kernel table in {path}: it is for (8,) tokens" in caplog.text
    assert kernel_table.load(path, 16, ["dense"]) == measured


def test_a_kept_table_of_another_weight_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = KernelTable(48, [Bucket(8, DENSE, [DENSE])])
    kernel_table.save(kept, tmp_path / "table.json")
    path = tmp_path / "table.json"
    monkeypatch.setattr(kernel_table, "path_of", lambda weight, allowed: path)
    measured = dense_for_all(16)
    monkeypatch.setattr(linear, "measure", measuring(measured))
    weight = sparse_weight(16, 64, torch.bfloat16)
    assert linear._table(weight, ["dense"]) == measured
    assert kernel_table.load(path, 16, ["dense"]) == measured


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for kernel tables, by the weight's rows; nothing is announced yet."""
    monkeypatch.setattr(linear, "_EXPECTED", {})
    monkeypatch.setattr(linear, "_MEASURED", {})
    monkeypatch.setattr(linear, "_WAITING", [])
    paths = lambda weight, allowed: tmp_path / str(weight.shape[0])  # noqa: E731
    monkeypatch.setattr(kernel_table, "path_of", paths)
    return tmp_path


def test_all_shapes_that_are_announced_are_measured_together_and_once(
    pretended_gpu: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    empty_cache: Path,
) -> None:
    calls: list[dict[str, Asked]] = []
    stand_in = measuring(dense_for_all(16), calls)
    monkeypatch.setattr(linear, "measure", stand_in)
    monkeypatch.setattr(linear, "warm_up", lambda weight, layer: None)
    started = iter(["a process"])
    monkeypatch.setattr(linear, "start", lambda: next(started))  # once only
    (empty_cache / "64").write_text("a table")
    known = pretended_gpu(sparse_weight(16, 64, torch.bfloat16))
    rows = (32, 32, 48, 64)
    others = [sparse_weight(each, 64, torch.bfloat16) for each in rows]
    gpu = [known, *(weight.as_subclass(OnGpu) for weight in others)]
    assert [linear.expect(weight, "auto") for weight in gpu] == [
        *(False, True, True, True, False)
    ]
    for weight in gpu[:4]:
        SparseLinear.prepare(weight, "auto", is_checked=True)
    (asked,) = calls
    kernels = ["dense", "cusparselt"]
    assert [*asked.values()] == [Asked(n, 64, "bfloat16", kernels) for n in (32, 48)]
    assert {path.name for path in empty_cache.iterdir()} == {"32", "48", "64"}
    assert not linear.expect(gpu[1], "auto")


def test_a_shape_without_a_table_stays_dense_and_is_asked_for_again_later(
    pretended_gpu: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    empty_cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def crashed(
        asked: dict[str, Asked], device: torch.device, process: object
    ) -> Measured:
        return Measured({}, dict.fromkeys(asked, "it crashed"), {}, {})

    pretended_gpu(sparse_weight(16, 64, torch.bfloat16))
    weight = sparse_weight(32, 64, torch.bfloat16).as_subclass(OnGpu)
    monkeypatch.setattr(linear, "measure", crashed)
    reason = SparseLinear.prepare(weight, "auto", is_checked=True)
    assert reason == "no sparse kernel is faster for its shape, (32, 64)"
    assert "no sparse kernels run for this shape: it crashed" in caplog.text
    assert list(empty_cache.iterdir()) == []


def test_a_table_that_does_not_run_on_the_true_weight_is_not_kept(
    pretended_gpu: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    empty_cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pretended_gpu(sparse_weight(16, 64, torch.bfloat16))
    weight = sparse_weight(32, 64, torch.bfloat16).as_subclass(OnGpu)
    foreign = KernelTable(32, [Bucket(8, DENSE, [DENSE])])
    monkeypatch.setattr(linear, "measure", measuring(foreign))
    SparseLinear.prepare(weight, "auto", is_checked=True)
    assert "for this shape: it is for (8,) tokens" in caplog.text
    assert list(empty_cache.iterdir()) == []


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
    refusal = KERNELS[name].unsupported(sparse_weight(32, 128, torch.bfloat16))
    assert refusal == "no CUDA device"


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernels_refuse_unknown_dtypes(name: str) -> None:
    refusal = KERNELS[name].unsupported(torch.zeros(32, 128, dtype=torch.float32))
    known = "torch.float32 has no kernel; these have: bfloat16, float16"
    assert refusal is not None
    assert refusal.startswith(known)


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8"])
def test_a_layer_runs_compiled_and_not(
    kind: str, tokens: int, dense_table: str
) -> None:
    """The CPU has no float8 product."""
    weight = sparse_weight(16, 64, DTYPES[kind])
    x = random_tokens(weight, tokens)
    scales = scales_for(weight, tokens, bias=True) if kind == "int8" else None
    layer = SparseLinear(weight, dense_table)
    torch.compiler.reset()

    def call(x: torch.Tensor) -> torch.Tensor:
        return layer(x) if scales is None else layer.scaled_mm(x, *scales)

    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        out = run(x)
        assert out.shape == (tokens, 16)
        assert out.dtype == (scales.out_dtype if scales else x.dtype)
        if tokens:
            assert error(out, exact(weight, x, scales)) < BOUND


def test_a_layer_compiles_whole_for_all_numbers_of_tokens(dense_table: str) -> None:
    weight = sparse_weight(16, 64, torch.bfloat16)
    layer = SparseLinear(weight, dense_table)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: layer(x) + 1, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for tokens in (2, 5, 9):
        x = random_tokens(weight, tokens)
        torch._dynamo.mark_dynamic(x, 0)  # an error where a graph is for one number
        assert error(compiled(x), exact(weight, x) + 1) < BOUND


def test_a_compiled_graph_is_for_a_table_and_for_our_source_kernels_included(
    dense_table: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weight = sparse_weight(16, 64, torch.bfloat16)
    layer = SparseLinear(weight, dense_table)
    before = layer.signature
    assert before.startswith("dense: dense, ")
    package = tmp_path / "serving"
    copytree(
        Path(linear.__file__).parent, package, ignore=ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(linear, "files", lambda name: package)
    try:
        linear._source.cache_clear()
        assert layer.signature == before
        changed = [before]
        for name in ("product.py", "kernels/scaling.py", "kernels/kernel.py"):
            file = package / name
            file.write_text(file.read_text() + "\n")
            assert layer.signature == changed[-1]  # the source is read once a process
            linear._source.cache_clear()
            changed.append(layer.signature)
    finally:
        linear._source.cache_clear()
    assert len(set(changed)) == 4


def test_the_operators_schema_and_fake_hold(dense_table: str) -> None:
    weight = sparse_weight(16, 64, torch.bfloat16)
    arguments = (random_tokens(weight, 3), [weight], dense_table)
    torch.library.opcheck(
        sparse24_linear, arguments, test_utils=("test_schema", "test_faketensor")
    )
