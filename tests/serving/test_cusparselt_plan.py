# SPDX-License-Identifier: Apache-2.0
"""Plans are made once a size; a fake stands in for the library, which needs a GPU."""

import ctypes
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from nm_permute_plugin.serving.kernels import cusparselt_plan
from nm_permute_plugin.serving.kernels.cusparselt_plan import ProductSize, plan_of

SIZE = ProductSize(
    *(0, 64, 128, 16, torch.float8_e4m3fn, torch.bfloat16),
    algorithm=7,
    split_k=1,
    split_k_mode=-1,
)


@dataclass
class FakeLibrary:
    """
    Answers every call.

    :param refuses: the function that answers 10, not supported
    :param lacks: the function that it does not have
    :param version: its version, in torch's count
    :param written: the bytes that it writes into a plan
    """

    refuses: str = ""
    lacks: str = ""
    version: int = 800
    written: int = 512
    called: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name == f"cusparseLt{self.lacks}":
            raise AttributeError(f"there is no {name}")

        def answer(*arguments: Any) -> int:
            self.called.append(name.removeprefix("cusparseLt"))
            if self.called[-1] == "GetProperty":
                which, at = arguments
                at._obj.value = (0, self.version // 100, self.version % 100)[which]
            if self.called[-1] == "MatmulPlanInit":
                ctypes.memset(arguments[1], 0, self.written)
            return 10 if self.called[-1] == self.refuses else 0

        return answer


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    """A fake of version 0.8 in the library's place; nothing is remembered."""
    fake = FakeLibrary()
    monkeypatch.setattr(cusparselt_plan, "_library", lambda: fake)
    monkeypatch.setattr(
        cusparselt_plan, "_handle", lambda device: cusparselt_plan._Structure(64)
    )
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 800)
    cusparselt_plan._is_sound.cache_clear()
    plan_of.cache_clear()
    assert cusparselt_plan._is_sound(0, 800)
    fake.called.clear()
    yield fake
    cusparselt_plan._is_sound.cache_clear()
    plan_of.cache_clear()


def test_a_plan_is_made_once_for_each_size(library: FakeLibrary) -> None:
    first = plan_of(SIZE)
    assert first is not None
    assert plan_of(SIZE) is first
    assert library.called.count("MatmulPlanInit") == 1
    assert plan_of(SIZE._replace(tokens=32)) is not first
    assert library.called.count("MatmulPlanInit") == 2


def test_what_the_library_holds_ends_with_the_plan(library: FakeLibrary) -> None:
    plan_of(SIZE)
    assert "MatmulPlanDestroy" not in library.called
    plan_of.cache_clear()
    assert library.called[-1] == "MatmulPlanDestroy"


def test_the_algorithm_is_set_and_nothing_that_was_not_chosen(
    library: FakeLibrary,
) -> None:
    plan_of(SIZE)
    assert library.called.count("MatmulAlgSetAttribute") == 1
    library.called.clear()
    plan_of(SIZE._replace(split_k=-1, split_k_mode=2, dtype=torch.int8))
    assert library.called.count("MatmulAlgSetAttribute") == 3


def test_structures_are_apart_and_aligned(library: FakeLibrary) -> None:
    plan = plan_of(SIZE)
    assert plan is not None
    addresses = sorted(kept.address.value or 0 for kept in plan._kept)
    assert all(address % 64 == 0 for address in addresses)
    gaps = [b - a for a, b in zip(addresses, addresses[1:], strict=False)]
    assert min(gaps) >= cusparselt_plan._STRUCTURE_BYTES


def test_a_size_that_the_library_refuses_is_left_to_torch(
    library: FakeLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    library.refuses = "MatmulPlanInit"
    with caplog.at_level(logging.WARNING):
        assert plan_of(SIZE) is None
        assert plan_of(SIZE) is None
    (message,) = caplog.messages
    assert "cusparseLtMatmulPlanInit answered 10" in message


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "0.0.0"), (702, "0.7.2"), (802, "0.8.2"), (900, "0.9.0"), (1000, "0.10.0")],
)
def test_a_version_that_is_not_tested_is_left_to_torch_and_logged_once(
    library: FakeLibrary,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: int | None,
    words: str,
) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
    with caplog.at_level(logging.WARNING):
        assert plan_of(SIZE) is None
        assert plan_of(SIZE._replace(tokens=32)) is None
    assert library.called == []
    (message,) = caplog.messages
    assert f"its version {words} is not a tested one, 0.8.0 and 0.8.1 are" in message


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"version": 801}, "libcusparseLt.so.0 is version 0.8.1, torch's is 0.8.0"),
        ({"written": 513}, "its structures are larger than 512 bytes"),
        ({"written": 11024}, "its structures are larger than 512 bytes"),
        ({"refuses": "MatmulPlanInit"}, "cusparseLtMatmulPlanInit answered 10"),
        ({"lacks": "MatmulGetWorkspace"}, "no cusparseLtMatmulGetWorkspace"),
    ],
    ids=["another file", "a byte more", "old handles", "refused", "gone"],
)
def test_a_library_that_is_not_as_its_version_says_is_left_to_torch(
    library: FakeLibrary,
    caplog: pytest.LogCaptureFixture,
    wrong: dict[str, Any],
    told: str,
) -> None:
    cusparselt_plan._is_sound.cache_clear()
    for name, value in wrong.items():
        setattr(library, name, value)
    with caplog.at_level(logging.WARNING):
        assert plan_of(SIZE) is None
        assert plan_of(SIZE._replace(tokens=32)) is None
    (message,) = caplog.messages
    assert message.startswith("torch makes cuSPARSELt's plans at every call")
    assert told in message


@pytest.mark.parametrize("version", [800, 801])
def test_a_tested_version_is_called_directly(
    library: FakeLibrary,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: int,
) -> None:
    library.version = version
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
    with caplog.at_level(logging.WARNING):
        assert plan_of(SIZE) is not None
    assert not caplog.messages
