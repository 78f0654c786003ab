# SPDX-License-Identifier: Apache-2.0
"""Kernels that a card is offered compile and fit; others are refused in words."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import CARDS, FEW_CARDS, weight_on
from weights import DTYPES

from nm_permute_plugin.serving import cache, kernel_table, linear
from nm_permute_plugin.serving.kernels import nvidia
from nm_permute_plugin.serving.kernels.mma_sp import MmaSp
from nm_permute_plugin.serving.kernels.nvidia import Card, card_of

SCRIPT = Path(__file__).parent / "compile_kernels.py"
WITHOUT_FP8 = ("sm_80", "sm_86")


@pytest.fixture(scope="module")
def compiled(run_triton) -> list[dict[str, Any]]:
    """The rows of ``compile_kernels.py``."""
    try:
        nvidia.compile_source("", "sm_90", {})
    except RuntimeError as missing:
        pytest.skip(str(missing))
    return run_triton(SCRIPT)


def test_every_kernel_compiles_for_every_card_that_it_is_not_refused_on(
    compiled: list[dict[str, Any]],
) -> None:
    for row in compiled:
        on_card = row["card"], row["kernel"]
        if row["dtype"] == "fp8" and row["card"] in WITHOUT_FP8:
            assert "requires .target sm_89" in row["fault"], on_card
        else:
            assert not row["fault"], on_card
    kernels = {(row["card"], row["kernel"].split()[0]) for row in compiled}
    serving = set(product(CARDS, ("mma_sp", "experts", "triton", "scaling")))
    assert kernels == serving | set(product(FEW_CARDS, ("codec", "kl", "masks")))


def test_every_kernel_fits_the_shared_memory_of_its_card(
    compiled: list[dict[str, Any]],
) -> None:
    assert max(row["shared"] for row in compiled) > 64 << 10
    for row in compiled:
        assert row["shared"] <= CARDS[row["card"]].shared_bytes, row


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", CARDS)
def test_kernels_are_offered_or_refused_in_words(name: str, dtype: torch.dtype) -> None:
    with weight_on(CARDS[name], dtype) as weight:
        allowed = linear._allowed(weight, "auto")
        reason = linear._unsupported(weight, "auto")
    if dtype == torch.float8_e4m3fn and name in WITHOUT_FP8:
        assert allowed == ["dense"]
        told = f"compute capability {name[3]}.{name[4]}, float8_e4m3fn needs 8.9"
        assert reason is not None
        assert f"mma_sp: its card has {told}" in reason
        assert f"cusparselt: its card has {told}" in reason
    else:
        assert allowed == ["dense", "cusparselt", "mma_sp"]
        assert reason is None


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_card_of_before_sparse_tensor_cores_is_refused(dtype: torch.dtype) -> None:
    with weight_on(Card((7, 5), 63 << 10), dtype) as weight:
        reason = linear._unsupported(weight, "auto")
    assert reason is not None
    for kernel in ("cusparselt", "mma_sp"):
        assert f"{kernel}: its card has compute capability 7.5, " in reason


def test_another_makers_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1")
    with weight_on(Card((9, 4), 64 << 10), torch.bfloat16) as weight:
        reason = linear._unsupported(weight, "auto")
    assert reason is not None
    assert "mma_sp: the sparse kernels are for NVIDIA's cards" in reason


@pytest.mark.parametrize("name", CARDS)
def test_the_shared_memory_of_a_card_is_what_cuda_does_not_keep(name: str) -> None:
    with weight_on(CARDS[name], torch.bfloat16) as weight:
        assert card_of(weight.device) == CARDS[name]


def test_a_cache_that_cannot_be_looked_into_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(cache.FOLDER, "/a" + "b" * 300)  # no such name is allowed
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    with weight_on(CARDS["sm_89"], torch.bfloat16) as weight:
        monkeypatch.setattr(linear, "_EXPECTED", {})
        monkeypatch.setattr(linear, "_WAITING", [None])  # no process is started
        assert linear.expect(weight, "auto")
        path = kernel_table.path_of(weight, ["dense"])
    assert kernel_table.load(path, 16, ["dense"]) is None
    choice = kernel_table.Choice("dense", (), 1.0)
    buckets = [kernel_table.Bucket(1, choice, [])]
    kernel_table.save(kernel_table.KernelTable(16, buckets), path)


def test_settings_that_do_not_fit_a_card_are_not_taken_from_disk() -> None:
    large = (1, 1, 8, 1, 4, 0)  # 8 warps with 4 chunks each in shared memory
    for name, fits in (("sm_100", True), ("sm_120", False), ("sm_89", False)):
        with weight_on(CARDS[name], torch.bfloat16) as weight:
            assert MmaSp().takes(weight, 8, large) == fits
            assert not MmaSp().takes(weight, 9, large)
