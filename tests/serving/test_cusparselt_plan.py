# SPDX-License-Identifier: Apache-2.0
"""Plans are made once a size; a fake stands in for the library, which needs a GPU."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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
    """

    refuses: str = ""
    called: list[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., int]:
        def answer(*arguments: object) -> int:
            self.called.append(name.removeprefix("cusparseLt"))
            return 10 if self.called[-1] == self.refuses else 0

        return answer


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    """A fake of version 0.8 in the library's place; nothing is remembered."""
    fake = FakeLibrary()
    monkeypatch.setattr(cusparselt_plan, "_library", lambda: fake)
    monkeypatch.setattr(
        cusparselt_plan, "_handle", lambda device: cusparselt_plan._Structure()
    )
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 800)
    cusparselt_plan._is_tested.cache_clear()
    plan_of.cache_clear()
    yield fake
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


@pytest.mark.parametrize("version", [None, 702, 799, 900, 1000])
def test_a_version_that_is_not_tested_is_left_to_torch_and_logged_once(
    library: FakeLibrary,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: int | None,
) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
    with caplog.at_level(logging.WARNING):
        assert plan_of(SIZE) is None
        assert plan_of(SIZE._replace(tokens=32)) is None
    assert library.called == []
    (message,) = caplog.messages
    assert message.startswith(f"cuSPARSELt {version or 0} is not one of the tested")


@pytest.mark.parametrize("version", [800, 801, 899])
def test_a_tested_version_is_called_directly(
    library: FakeLibrary,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: int,
) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
    with caplog.at_level(logging.WARNING):
        assert plan_of(SIZE) is not None
    assert not caplog.messages
