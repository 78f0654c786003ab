# SPDX-License-Identifier: Apache-2.0
"""Which kernel of routed experts is chosen, and what is tried before."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from weights import exact_experts, expert_weights

from nm_permute_plugin.serving import expert_probe, expert_table, kernel_table
from nm_permute_plugin.serving.expert_table import DENSE, SPARSE, table_of
from nm_permute_plugin.serving.kernel_table import BUCKETS, Bucket, Choice, KernelTable
from nm_permute_plugin.serving.kernels import experts
from nm_permute_plugin.serving.kernels.experts import PackedExperts, pack_experts
from nm_permute_plugin.serving.kernels.kernel import Settings
from nm_permute_plugin.serving.kernels.packing import unpack

Weights = tuple[PackedExperts, PackedExperts]

RIGHT, WRONG = (1, 1, 2, 4, 1, 1, 3, 1), (1, 1, 2, 4, 0, 1, 3, 0)
"""Settings of the stand-in for the kernel; with the latter it gives wrong results."""


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Weights:
    """Experts whose tables are kept in a folder of the test's, of no card."""
    monkeypatch.setattr(kernel_table, "path_of", lambda *of: tmp_path / "table.json")
    for name in ("_TABLES", "_FAULTS", "_SCRATCH"):
        monkeypatch.setattr(expert_table, name, {})
    up, down = expert_weights(4, 128, 128, torch.bfloat16)
    return pack_experts(up), pack_experts(down)


def of(kernel: str, settings: tuple[int, ...], buckets: tuple[int, ...]) -> KernelTable:
    """A table that chooses one kernel for all tokens."""
    choice = Choice(kernel, settings, 1.0)
    return KernelTable(256, [Bucket(tokens, choice, [choice]) for tokens in buckets])


def no_bucket(*words: object) -> Bucket:
    raise AssertionError("a kernel that crashes must not run in this process")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the point is a missing GPU")
def test_a_crash_in_a_process_of_its_own_leaves_experts_to_vllm(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a real process, which ends as it finds no card
    monkeypatch.setattr(expert_table, "_bucket", no_bucket)
    with pytest.raises(RuntimeError, match="a process that tried it ended with exit"):
        table_of(*weights, 2, print)


def test_experts_of_a_size_are_tried_once(
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The crash is a stand-in: no CPU can have it."""
    tried = []

    def crash_of(module: str, *words: object) -> str:
        tried.append([module, *map(str, words)])
        return "an illegal memory access"

    monkeypatch.setattr(expert_table, "crash_of", crash_of)
    monkeypatch.setattr(expert_table, "_bucket", no_bucket)
    for _ in range(3):  # layers
        with pytest.raises(RuntimeError, match="^an illegal memory access$"):
            table_of(*weights, 2, print)
    module = "nm_permute_plugin.serving.expert_probe"
    assert tried == [[module, "4", "128", "128", "2", "bfloat16", "cpu"]]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (
            of(SPARSE, RIGHT, BUCKETS),
            f"experts with {RIGHT} for 128 tokens does not exist",
        ),
        (
            of(SPARSE, (1, 2), BUCKETS),
            "experts with (1, 2) for 1 tokens does not exist",
        ),
        (of(DENSE, (), (1, 4)), "it is for (1, 4) tokens"),
        (of(DENSE, (), BUCKETS), None),
    ],
    ids=["settings of few tokens", "foreign settings", "foreign buckets", "good"],
)
def test_a_kept_table_of_other_kernels_is_measured_again(
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    table: KernelTable,
    fault: str | None,
) -> None:
    kernel_table.save(table, tmp_path / "table.json")
    monkeypatch.setattr(expert_table, "crash_of", lambda *words: None)
    choice = Choice(DENSE, (), 2.0)
    monkeypatch.setattr(
        expert_table, "_bucket", lambda up, down, n, *_: Bucket(n, choice, [choice])
    )
    with caplog.at_level(logging.WARNING):
        taken = table_of(*weights, 2, print)
    if fault is None:
        assert taken == table
        assert not caplog.messages
    else:
        assert taken.choice(1) == choice
        (message,) = caplog.messages
        assert fault in message


def dense_of(weight: PackedExperts, out: Tensor | None = None) -> Tensor:
    """Expand packed weights on a CPU."""
    shape = weight.dense_shape[1:]
    every = [unpack(packed, shape, weight.dtype) for packed in weight.packed]
    return torch.stack(every)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Tokens, settings and places of each call of the stand-in for the kernel."""
    found = []

    def run(
        x: Tensor,
        up: PackedExperts,
        down: PackedExperts,
        scales: Tensor,
        ids: Tensor,
        settings: Settings,
        places: Tensor | None = None,
    ) -> Tensor:
        found.append((len(x), settings, places is None))
        if len(x) == 4 and settings == WRONG and places is not None:
            raise RuntimeError("refused")
        out = exact_experts(dense_of(up), dense_of(down), x, scales, ids).to(x.dtype)
        return out * 2 if settings == WRONG else out

    monkeypatch.setattr(experts, "run", run)
    monkeypatch.setattr(experts, "candidates", lambda *sizes: [WRONG, RIGHT])
    monkeypatch.setattr(PackedExperts, "expand", dense_of)
    return found


@pytest.mark.parametrize(
    ("taken", "chosen"), [(9.0, SPARSE), (7.0, SPARSE), (3.0, DENSE)]
)
@pytest.mark.usefixtures("calls")
def test_the_fastest_kernel_is_chosen_and_wrong_results_are_left_out(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, taken: float, chosen: str
) -> None:
    """No clock is looked at: times are made up. vLLM's product takes ``taken``."""
    timed = []

    def microseconds(products: list[Callable[[], Tensor]]) -> float:
        settings = products[0].args[0]
        timed.append(settings if isinstance(settings, tuple) else ())
        return {RIGHT: 7.0, WRONG: 1.0, (): taken}[timed[-1]]

    def dense(x: Tensor, up: Tensor, down: Tensor, *routing: Tensor) -> Tensor:
        return exact_experts(up, down, x, *routing).to(x.dtype)

    monkeypatch.setattr(expert_table, "microseconds", microseconds)
    bucket = expert_table._bucket(*weights, 3, 2, dense)
    assert bucket.chosen.kernel == chosen
    assert {choice.kernel for choice in bucket.fastest} == {SPARSE, DENSE}
    assert timed == [RIGHT, ()]


def test_every_setting_is_tried_with_and_without_all_experts(
    weights: Weights,
    calls: list[tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(expert_probe, "BUCKETS", (1, 4))
    expert_probe.try_settings(*weights, 2)
    tried = [(n, which, here) for n in (1, 4) for which in (WRONG, RIGHT)
             for here in (True, False)]  # fmt: skip
    assert calls == tried
    assert capsys.readouterr().out == f"{WRONG}, 4 tokens: refused\n"
