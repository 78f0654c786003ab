# SPDX-License-Identifier: Apache-2.0
"""What ``bench-serve --check`` writes of stand-ins for kernels, clock and processes."""

from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from stand_in_kernels import StandIn
from torch import Tensor
from typer.testing import CliRunner

from nm_permute_plugin.cli.app import app
from nm_permute_plugin.serving import card_check, tune
from nm_permute_plugin.serving.card_check import TOKENS, Calls, check_card
from nm_permute_plugin.serving.kernels.kernel import DTYPES_8, DTYPES_16, Settings

DTYPES = DTYPES_16 + DTYPES_8
SHAPE = (64, 256)


@dataclass(frozen=True)
class StandInDense(StandIn):
    """Passes for the dense kernel: torch has no float8 product on every CPU."""

    name: str = "dense"

    def candidates(self, packed: Tensor, x: Tensor, rows: int) -> list[Settings]:
        return [()]


@dataclass(frozen=True)
class Only16Bits(StandIn):
    """Refuses weights of 8 bits, and more than 16 tokens."""

    name: str = "only16"

    def unsupported(self, weight: Tensor) -> str | None:
        return "its card is too old" if weight.dtype in DTYPES_8 else None

    def candidates(self, packed: Tensor, x: Tensor, rows: int) -> list[Settings]:
        return [(1,), (2,)] if len(x) <= 16 else []


@dataclass(frozen=True)
class Wrong(StandIn):
    """Is off in its first output."""

    name: str = "wrong"

    def run(self, packed: Tensor, x: Tensor, rows: int, settings: Settings) -> Tensor:
        out = super().run(packed, x, rows, settings)
        out[0, 0] += out.abs().max()
        return out


@dataclass(frozen=True)
class Failing(StandIn):
    """Does not compile."""

    name: str = "failing"

    def candidates(self, packed: Tensor, x: Tensor, rows: int) -> list[Settings]:
        raise RuntimeError("compiling failed:\nline 1 | unknown instruction")


@pytest.fixture(scope="module")
def written() -> str:
    """The text for stand-ins, one of which crashes in its process."""
    kernels = (StandInDense(), StandIn(), Only16Bits(), Wrong(), Failing())

    def clock(calls: Calls) -> float:
        name = calls[0].func.__self__.name  # type: ignore[attr-defined]
        return {"dense": 30.0, "triton": 20.0}.get(name, 15.0)

    def probe(name: str, weight: Tensor) -> str | None:
        crashes = name == "triton" and weight.dtype == torch.int8
        return "a process that tried it ended with signal SIGILL" if crashes else None

    with patch.object(tune, "COLD_BYTES", 0):  # no cache to be larger than
        return check_card(
            {kernel.name: kernel for kernel in kernels},
            [SHAPE],
            device="cpu",
            time=clock,
            probe=probe,
        )


@pytest.fixture(scope="module")
def rows(written: str) -> dict[tuple[str, str], list[str]]:
    """The cells after weight and kernel, by both."""
    table = [line for line in written.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return {(weight, kernel): rest for weight, kernel, *rest in cells}


def test_every_kernel_has_a_row_for_every_dtype(rows: dict) -> None:
    words = [f"{str(dtype).removeprefix('torch.')} 64 x 256" for dtype in DTYPES]
    names = ("dense", "triton", "only16", "wrong", "failing")
    assert list(rows) == [(word, name) for word in words for name in names]
    assert {len(cells) for cells in rows.values()} == {len(TOKENS) + 2}


def test_times_are_beside_those_of_the_dense_product(rows: dict) -> None:
    *times, off, notes = rows["bfloat16 64 x 256", "triton"]
    assert times == ["20.0 (1.50x)"] * 3 + [""]  # it takes 64 tokens at most
    assert 0 < float(off) < 0.01
    assert notes == ""
    assert rows["bfloat16 64 x 256", "dense"][:4] == ["30.0"] * 4
    assert rows["float16 64 x 256", "only16"][:4] == ["15.0 (2.00x)"] * 2 + [""] * 2


def test_what_is_refused_or_crashes_or_is_wrong_is_told(rows: dict) -> None:
    nothing = [""] * 5
    fp8, int8 = "float8_e4m3fn 64 x 256", "int8 64 x 256"
    assert rows[fp8, "only16"] == [*nothing, "refused: its card is too old"]
    crashed = "a process that tried it ended with signal SIGILL"
    assert rows[int8, "triton"] == [*nothing, crashed]
    failed = "compiling failed: line 1 / unknown instruction"
    assert rows[int8, "failing"] == [*nothing, failed]
    assert rows[int8, "wrong"][:5] == nothing
    assert "WRONG: off by" in rows[int8, "wrong"][5]


def test_the_machine_and_its_versions_come_first(written: str) -> None:
    card, versions, scaling = written.splitlines()[:3]
    assert card.startswith("- card: no CUDA device; driver ")
    assert f"torch {torch.__version__}" in versions
    assert "cuSPARSELt" in versions
    assert scaling == "- packing, and scaling of 8-bit products: ok"


def test_what_pytorch_does_in_place_of_triton_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(card_check.scaling, "FAULTS", ["OSError: no C | compiler"])
    assert card_check._scaling("cpu").endswith(
        "ok, by PyTorch, since Triton failed with OSError: no C / compiler"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_2of4_without_negative_zeros(dtype: torch.dtype) -> None:
    weight = tune.random_weight(SHAPE, dtype, "cpu")
    assert (weight.float().view(-1, 4) != 0).sum(-1).max() == 2
    assert not (weight.float().signbit() & (weight.float() == 0)).any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the point is a missing GPU")
def test_without_a_card_there_is_one_line() -> None:
    result = CliRunner().invoke(app, ["bench-serve", "--check"])
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --check runs the sparse kernels on a CUDA device")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "takes the folder of a 2:4 checkpoint; with --check instead"),
        (["MODEL", "--check"], "--check makes weights of its own: leave MODEL out"),
    ],
)
def test_a_checkpoint_or_a_check(words: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["bench-serve", *words])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert told in line
