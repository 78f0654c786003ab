# SPDX-License-Identifier: Apache-2.0
"""Kernels that fail or are wrong are never chosen."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from weights import DTYPES, error, exact, sparse_weight

from nm_permute_plugin.serving import tune as tune_module
from nm_permute_plugin.serving.kernel_table import BUCKETS, Bucket, Choice, KernelTable
from nm_permute_plugin.serving.kernels.dense import Dense
from nm_permute_plugin.serving.kernels.kernel import Settings
from nm_permute_plugin.serving.tune import (
    Contest,
    Parts,
    choose,
    cold_copies,
    fault_of,
    random_tokens,
    reference,
    tune,
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
    contest = Contest(x, reference(weight, x))
    with caplog.at_level(logging.WARNING):
        contest.add(kernel, [weight])
    assert contest.decide() == ([], [])
    (message,) = caplog.messages
    assert message.startswith("dense with () is not used for 3 tokens by 32 x 128 in ")
    assert reason in message


@dataclass(frozen=True)
class Near(Dense):
    """A kernel whose result is off by 0.04 of the largest, as sums of few bits may be."""

    def run(self, packed: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        out = (x.float() @ packed.float().t()).to(torch.bfloat16)
        out[0, 0] += 0.04 * out.abs().max()
        return out


@pytest.mark.parametrize(
    ("dtype", "names"),
    [(torch.float8_e4m3fn, ["dense"]), (torch.bfloat16, [])],
    ids=str,
)
def test_fp8_may_be_off_further(
    dtype: torch.dtype, names: list[str], monkeypatch
) -> None:
    monkeypatch.setattr(tune_module, "Recording", StandInClock({(): 1.0}, {(): 1.0}))
    weight = sparse_weight(32, 128, dtype)
    x = random_tokens(weight, 3)
    contest = Contest(x, reference(weight, x))
    contest.add(Near(), [weight])
    assert [choice.kernel for choice in contest.decide()[0]] == names


@dataclass(frozen=True)
class Many(Dense):
    """A kernel of many settings, each with a time of its own: the dense product."""

    name: str = "many"
    settings: tuple[Settings, ...] = ()

    def candidates(self, packed: Tensor, x: Tensor, rows: int) -> list[Settings]:
        return list(self.settings)

    def takes(self, weight: Tensor, tokens: int, settings: Settings) -> bool:
        return tokens <= 64


class StandInClock:
    """
    Stands in for recordings on a card: times are given, and what is timed is noted.

    :param short: the microseconds of a short measurement, by settings
    :param full: those of a full one
    """

    def __init__(
        self, short: dict[Settings, float], full: dict[Settings, float]
    ) -> None:
        self.short, self.full = short, full
        self.timed: list[tuple[str, Settings]] = []

    def __call__(self, calls: Sequence[Callable[[], Tensor]], other: object) -> object:
        settings = calls[0].args[-1]  # type: ignore[attr-defined]
        return StandInRecording(self, settings)


@dataclass
class StandInRecording:
    """One recording of a stand-in clock."""

    clock: StandInClock
    settings: Settings

    def microseconds(self, least: float = 3000.0, fewest: int = 5) -> float:
        is_short = (least, fewest) == tune_module.COARSE
        self.clock.timed.append(("short" if is_short else "full", self.settings))
        return (self.clock.short if is_short else self.clock.full)[self.settings]


def contest_of(
    clock: StandInClock, monkeypatch: pytest.MonkeyPatch, *kernels: Dense
) -> Contest:
    monkeypatch.setattr(tune_module, "Recording", clock)
    weight = sparse_weight(32, 128, torch.bfloat16)
    x = random_tokens(weight, 3)
    contest = Contest(x, reference(weight, x))
    for kernel in kernels:
        contest.add(kernel, [weight])
    return contest


def test_only_what_may_be_the_fastest_and_dense_are_measured_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = {(): 30.0, (1,): 12.0, (2,): 10.0, (3,): 12.6}
    full = {(): 29.0, (1,): 9.0, (2,): 10.0}
    clock = StandInClock(short, full)
    many = Many(settings=((1,), (2,), (3,)))
    finals, dropped = contest_of(clock, monkeypatch, Dense(), many).decide()
    assert [(c.settings, c.microseconds) for c in finals] == [
        ((), 29.0),
        ((1,), 9.0),
        ((2,), 10.0),
    ]
    assert dropped == [Choice("many", (3,), 12.6)]
    assert choose(finals).settings == (1,)


def test_with_endless_slack_everything_is_measured_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = {(): 30.0, (1,): 12.0, (2,): 500.0}
    clock = StandInClock(times, times)
    contest = contest_of(clock, monkeypatch, Dense(), Many(settings=((1,), (2,))))
    finals, dropped = contest.decide(slack=float("inf"))
    assert ([c.settings for c in finals], dropped) == ([(), (1,), (2,)], [])


def test_a_kernel_that_short_measurements_flatter_does_not_beat_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is chosen was measured as long as dense was."""
    clock = StandInClock({(): 30.0, (1,): 10.0, (2,): 20.0}, {(): 30.0, (1,): 50.0})
    contest = contest_of(clock, monkeypatch, Dense(), Many(settings=((1,), (2,))))
    finals, dropped = contest.decide()
    assert dropped == [Choice("many", (2,), 20.0)]
    assert choose(finals) == Choice("dense", (), 30.0)


def test_the_best_settings_for_fewer_tokens_are_tried_again_and_all_parts_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass(frozen=True)
    class Growing(Many):
        """Offers one setting for one token, and another for more."""

        def candidates(self, packed: Tensor, x: Tensor, rows: int) -> list[Settings]:
            return [(1,)] if len(x) == 1 else [(2,)]

    times = {(): 30.0, (1,): 10.0, (2,): 20.0}
    clock, told, parts = StandInClock(times, times), [], Parts()
    monkeypatch.setattr(tune_module, "Recording", clock)
    monkeypatch.setattr(tune_module, "COLD_BYTES", 0)
    kernels = {"dense": Dense(), "many": Growing()}
    weight = sparse_weight(32, 128, torch.bfloat16)
    table = tune(weight, kernels, parts, told.append)
    chosen = {bucket.tokens: bucket.chosen.settings for bucket in table.buckets}
    assert [chosen[n] for n in (1, 4, 64, 128)] == [(1,), (1,), (1,), (2,)]
    assert told == ["dense", "many"] * (1 + len(BUCKETS))
    assert set(parts) == {
        *("pack", "reference", "settings of dense", "settings of many"),
        *("check", "capture", "coarse", "fine"),
    }


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
