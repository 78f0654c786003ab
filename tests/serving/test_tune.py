# SPDX-License-Identifier: Apache-2.0
"""Kernels that fail or are wrong are never chosen."""

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from weights import DTYPES, error, exact, sparse_weight

from nm_permute_plugin.serving.kernel_table import BUCKETS, Bucket, Choice, KernelTable
from nm_permute_plugin.serving.kernels.dense import Dense
from nm_permute_plugin.serving.kernels.kernel import Settings
from nm_permute_plugin.serving.tune import (
    cold_copies,
    fault_of,
    measure_kernel,
    random_tokens,
    reference,
)


@dataclass(frozen=True)
class Wrong(Dense):
    """A kernel that is off in one output."""

    def run(self, packed: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        out = super().run(packed, x, rows, settings)
        out[0, 0] += out.abs().max() / 2
        return out


@dataclass(frozen=True)
class Failing(Dense):
    """A kernel that the driver refuses."""

    def run(self, packed: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        raise RuntimeError("the CUDA driver answered 1: invalid argument")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(Wrong(), "results are off by"), (Failing(), "the CUDA driver answered 1")],
    ids=["wrong", "failing"],
)
def test_a_bad_kernel_is_left_out_with_the_reason(
    kernel: Dense, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    weight = sparse_weight(32, 128, torch.bfloat16)
    x = random_tokens(weight, 3)
    with caplog.at_level(logging.WARNING):
        assert measure_kernel(kernel, [weight], x, reference(weight, x)) == []
    (message,) = caplog.messages
    assert message.startswith("dense with () is not used for 3 tokens by 32 x 128 in ")
    assert reason in message


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_the_reference_is_the_product_of_the_first_tokens(dtype: torch.dtype) -> None:
    weight = sparse_weight(32, 128, dtype)
    x = random_tokens(weight, 70)
    assert error(reference(weight, x), exact(weight, x)[:64]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_sample_does_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    """vLLM loads a model while its dtype is torch's default."""
    weight = sparse_weight(32, 128, dtype)
    expected = random_tokens(weight, 3)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = random_tokens(weight, 3)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == dtype
    assert torch.equal(found.float(), expected.float())


def test_copies_of_a_small_weight_do_not_fit_any_cache() -> None:
    copies = cold_copies(torch.zeros(1 << 20, dtype=torch.int8))
    assert sum(copy.nbytes for copy in copies) >= 100 << 20
    assert len({copy.data_ptr() for copy in copies}) == len(copies)


def kept(settings: Settings = (), buckets: tuple[int, ...] = BUCKETS) -> KernelTable:
    """A table that chooses one kernel for all tokens."""
    choice = Choice("dense", settings, 1.0)
    return KernelTable(32, [Bucket(tokens, choice, [choice]) for tokens in buckets])


@pytest.mark.parametrize(
    ("table", "kernel", "fault"),
    [
        (kept(), Dense(), None),
        (kept(), Wrong(), "dense with () for 1 tokens is off by"),
        (kept(), Failing(), "dense with () for 1 tokens: the CUDA driver answered 1"),
        (kept((1, 2)), Dense(), "dense with (1, 2) for 1 tokens does not exist"),
        (kept(buckets=(1, 4)), Dense(), "it is for (1, 4) tokens"),
    ],
    ids=["good", "wrong", "failing", "foreign settings", "foreign buckets"],
)
def test_a_kept_table_is_run_before_it_is_believed(
    table: KernelTable, kernel: Dense, fault: str | None
) -> None:
    found = fault_of(table, sparse_weight(32, 128, torch.bfloat16), {"dense": kernel})
    assert found is None if fault is None else str(found).startswith(fault)
