# SPDX-License-Identifier: Apache-2.0
"""The kernels of routed experts, in Triton's interpreter where there is no GPU."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from weights import BOUND

from nm_permute_plugin.serving import expert_table, kernel_table
from nm_permute_plugin.serving.expert_table import DENSE, SPARSE, table_of
from nm_permute_plugin.serving.kernel_table import BUCKETS, Bucket, Choice, KernelTable
from nm_permute_plugin.serving.kernels import experts
from nm_permute_plugin.serving.kernels.experts import StoredExperts, run, unsupported

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(run_triton) -> dict[str, Any]:
    """What ``interpret_experts.py`` found."""
    return run_triton(HERE / "interpret_experts.py")


def test_products_agree_with_float64(found: dict[str, Any]) -> None:
    # random shapes, empty experts, several blocks of one expert, experts of other devices
    assert len(found["products"]) == 16
    assert max(found["products"]) < BOUND


def test_pairs_are_sorted_into_blocks_of_one_expert(found: dict[str, Any]) -> None:
    assert found["alignments"] == [True] * 12


def test_dense_weights_are_written_bit_by_bit(found: dict[str, Any]) -> None:
    assert found["expansions"] == [True] * 2


def test_the_fastest_kernel_is_chosen_and_wrong_results_are_left_out(
    found: dict[str, Any],
) -> None:
    # vLLM's takes longer, as long, and less; the one that is wrong is never timed
    expected = [["experts", 2, False], ["experts", 2, False], ["dense", 2, False]]
    assert found["choices"] == expected


def test_every_setting_is_tried_with_and_without_all_experts(
    found: dict[str, Any],
) -> None:
    # with the last expert elsewhere, its pairs have no block
    tried = found["tried"]
    assert {tokens for tokens, *_ in tried} == {1, 4}
    assert {here for *_, here in tried} == {True, False}
    assert len(tried) == 8
    assert found["refused"] == "(16, 16, 16, 16, 16, 0, 4, 1), 4 tokens: refused"


def test_the_kernel_compiles_for_every_card_without_spilling_much(run_triton) -> None:
    found = run_triton(HERE / "compile_experts.py")
    assert {row["card"] for row in found} == {80, 90, 100}
    assert len(found) == 12
    for row in found:
        assert row["mma"], row  # tensor cores, and not loops
        assert row["shared"] <= 96 << 10, row
        assert row["spilled"] <= 64, row


def stored(channels: int, dtype: torch.dtype) -> StoredExperts:
    values = torch.zeros(2, 16, channels // 2, dtype=torch.float32).to(dtype)
    return StoredExperts(values, torch.zeros(2, 16, channels // 8, dtype=torch.uint8))


def test_what_the_kernel_does_not_multiply_is_told() -> None:
    bf16 = stored(64, torch.bfloat16)
    assert unsupported(bf16, bf16) == "no CUDA device"
    fp8 = stored(64, torch.float8_e4m3fn)
    assert "float8_e4m3fn has no kernel" in str(unsupported(fp8, fp8))


@pytest.fixture
def weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[StoredExperts, StoredExperts]:
    """Experts whose tables are kept in a folder of the test's, of no card."""
    monkeypatch.setattr(kernel_table, "path_of", lambda *of: tmp_path / "table.json")
    for name in ("_TABLES", "_FAULTS", "_SCRATCH"):
        monkeypatch.setattr(expert_table, name, {})
    return stored(64, torch.bfloat16), stored(8, torch.bfloat16)


def of(kernel: str, settings: tuple[int, ...], buckets: tuple[int, ...]) -> KernelTable:
    """A table that chooses one kernel for all tokens."""
    choice = Choice(kernel, settings, 1.0)
    return KernelTable(16, [Bucket(tokens, choice, [choice]) for tokens in buckets])


def no_bucket(*words: object) -> Bucket:
    raise AssertionError("a kernel that crashes must not run in this process")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the point is a missing GPU")
def test_a_crash_in_a_process_of_its_own_leaves_experts_to_vllm(
    weights: tuple[StoredExperts, StoredExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a real process, which ends as it finds no card
    monkeypatch.setattr(expert_table, "_bucket", no_bucket)
    with pytest.raises(RuntimeError, match="a process that tried it ended with exit"):
        table_of(*weights, 2, print)


def test_experts_of_a_size_are_tried_once(
    weights: tuple[StoredExperts, StoredExperts],
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
    assert tried == [[module, "2", "8", "16", "2", "bfloat16", "cpu"]]
    assert not list(tmp_path.iterdir())


GOOD = experts.candidates(8192, 2, 2)[-1]


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (of(SPARSE, GOOD, BUCKETS), "experts with "),
        (
            of(SPARSE, (1, 2), BUCKETS),
            "experts with (1, 2) for 1 tokens does not exist",
        ),
        (of(DENSE, (), (1, 4)), "it is for (1, 4) tokens"),
        (of(DENSE, (), BUCKETS), None),
    ],
    ids=["settings of prompts", "foreign settings", "foreign buckets", "good"],
)
def test_a_kept_table_of_other_kernels_is_measured_again(
    weights: tuple[StoredExperts, StoredExperts],
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


def test_what_triton_raises_leaves_the_kernel_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error is a stand-in for those of Triton's compiler."""

    def fails(*words: object) -> None:
        raise KeyError("a damaged cache")

    monkeypatch.setattr(experts, "align", fails)
    up, down = stored(64, torch.bfloat16), stored(8, torch.bfloat16)
    ids = torch.zeros(3, 2, dtype=torch.int32)
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="Triton: KeyError: 'a damaged cache'"):
        run(x, up, down, ids.float(), ids, GOOD)
