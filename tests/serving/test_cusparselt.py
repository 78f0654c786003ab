# SPDX-License-Identifier: Apache-2.0
"""cuSPARSELt is offered what it can do with a dtype; a fake stands in for the library."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from weights import BOUND, DTYPES, error, exact, product_of, sparse_weight

from nm_permute_plugin.serving.kernels import cusparselt
from nm_permute_plugin.serving.kernels.cusparselt import CuSparseLt
from nm_permute_plugin.serving.kernels.kernel import NARROW

KERNEL = CuSparseLt()
FOUND = 7  # the algorithm that the fake finds


class FakeLibrary:
    """
    torch's ``_cslt`` operators on a CPU; its compressed weight is the dense one.

    It refuses what the library on an H100 does: a vector of scales for float8, and a
    search in float16.

    :param searches: whether a search finds anything
    """

    def __init__(self, searches: bool = True) -> None:
        self.searches = searches
        self.searched: list[int] = []

    def multiply(
        self,
        form: Tensor,
        x: Tensor,
        alpha: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        **how: object,
    ) -> Tensor:
        """[tokens, out] for tokens [in, tokens]."""
        assert x.shape[1] % (16 if form.dtype in NARROW else 8) == 0
        if alpha is not None and form.dtype == torch.float8_e4m3fn:
            raise RuntimeError("cuSPARSELt: not supported")
        out = x.t().float() @ form.float().t()
        out = out if alpha is None else out * alpha
        return out.to(out_dtype or form.dtype)

    def search(
        self,
        form: Tensor,
        x: Tensor,
        bias: Tensor | None,
        alpha: Tensor | None,
        out_dtype: torch.dtype | None,
        transpose_result: bool,
    ) -> int:
        """The number of an algorithm."""
        self.searched.append(x.shape[1])
        if form.dtype == torch.float16 or not self.searches:
            raise RuntimeError("cuSPARSELt: internal error")
        self.multiply(form, x, alpha, out_dtype)
        return FOUND


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeLibrary]:
    """A factory: puts a fake of the library in torch's place."""

    def make(searches: bool = True) -> FakeLibrary:
        library = FakeLibrary(searches)
        monkeypatch.setattr(torch, "_cslt_sparse_mm", library.multiply)
        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", library.search)
        monkeypatch.delattr(torch._C, "_cusparselt", raising=False)
        monkeypatch.setattr(cusparselt, "plan_of", lambda size: None)
        return library

    return make


DEFAULT_ONLY = [(0, 1, -1, 0, 0)]
SEARCHED = [(FOUND, 1, -1, 0, 0), *DEFAULT_ONLY]
FUSED = [(FOUND, 1, -1, 1, 0), (0, 1, -1, 1, 0)]


@pytest.mark.parametrize(
    ("kind", "offered"),
    [
        ("bf16", SEARCHED),
        ("fp16", DEFAULT_ONLY),
        ("fp8", SEARCHED),
        ("int8", FUSED + SEARCHED),
    ],
)
def test_a_dtype_is_offered_what_the_library_can_do_with_it(
    kind: str, offered: list[tuple[int, ...]], fake: Callable[..., FakeLibrary]
) -> None:
    library = fake()
    weight = sparse_weight(128, 256, DTYPES[kind])
    assert KERNEL.candidates(weight, product_of(weight, 20)) == offered
    assert bool(library.searched) == (kind != "fp16")


@pytest.mark.parametrize("kind", DTYPES)
def test_the_default_algorithm_is_left_where_a_search_fails(
    kind: str, fake: Callable[..., FakeLibrary], caplog: pytest.LogCaptureFixture
) -> None:
    fake(searches=False)
    weight = sparse_weight(128, 256, DTYPES[kind])
    with caplog.at_level(logging.INFO):
        offered = KERNEL.candidates(weight, product_of(weight, 20))
    assert [chosen[0] for chosen in offered] == [0] * len(offered)
    assert DEFAULT_ONLY[0] in offered
    if kind != "fp16":
        assert "search failed for 20 tokens by 128 x 256" in caplog.text


def test_small_odd_shapes_are_never_searched(
    fake: Callable[..., FakeLibrary],
) -> None:
    library = fake()
    weight = sparse_weight(96, 384, torch.bfloat16)
    assert KERNEL.candidates(weight, product_of(weight, 20)) == DEFAULT_ONLY
    assert not library.searched


@pytest.mark.parametrize(
    ("kind", "tokens", "few"),
    [
        ("fp8", 700, 256),
        ("int8", 700, 256),
        ("fp8", 256, 0),
        ("bf16", 700, 0),  # nothing is left to do once it is multiplied
    ],
)
def test_many_tokens_of_8_bits_are_offered_in_parts_too(
    kind: str,
    tokens: int,
    few: int,
    fake: Callable[..., FakeLibrary],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = fake()
    monkeypatch.setattr(cusparselt, "PART_BYTES", 64 << 10)
    weight = sparse_weight(128, 256, DTYPES[kind])
    offered = KERNEL.candidates(weight, product_of(weight, tokens))
    parted = [chosen for chosen in offered if chosen[-1]]
    assert parted == ([(FOUND, 1, -1, int(kind == "int8"), few)] if few else [])
    if few:
        assert library.searched[-1] == few


def test_sums_that_stay_in_the_cache_are_not_parted() -> None:
    weight = sparse_weight(128, 256, torch.int8)
    assert not cusparselt._tokens_at_a_time(product_of(weight, 8192))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("tokens", [1, 20, 700])
def test_whatever_is_offered_is_the_product(
    tokens: int,
    kind: str,
    fake: Callable[..., FakeLibrary],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake()
    monkeypatch.setattr(cusparselt, "PART_BYTES", 64 << 10)
    weight = sparse_weight(128, 256, DTYPES[kind])
    for each in (True, False):
        product = product_of(
            weight, tokens, per_token=each, per_channel=each, bias=each
        )
        expected = exact(weight, product)
        for chosen in KERNEL.candidates(weight, product):
            out = KERNEL.run(weight, product, chosen)
            assert out.shape == (tokens, 128)
            assert out.dtype == product.out_dtype
            assert error(out, expected) < BOUND
