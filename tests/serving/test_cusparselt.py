# SPDX-License-Identifier: Apache-2.0
"""cuSPARSELt is offered what it can do with a dtype; a fake stands in for the library."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from weights import BOUND, DTYPES, error, exact, sparse_weight

from nm_permute_plugin.checkpoint.codec import clear_negative_zeros
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.serving.kernels import cusparselt
from nm_permute_plugin.serving.kernels.cusparselt import CuSparseLt
from nm_permute_plugin.serving.kernels.kernel import DTYPES_8, output_dtype
from nm_permute_plugin.serving.tune import random_tokens

KERNEL = CuSparseLt()
FOUND = 7  # the algorithm that the fake finds


class FakeLibrary:
    """
    torch's ``_cslt`` operators on a CPU; its compressed weight is the dense one.

    It refuses what they refuse on an H100: a search in float16, and an output dtype by
    name for 16-bit weights.

    :param searches: whether a search finds anything
    """

    def __init__(self, searches: bool = True) -> None:
        self.searches = searches
        self.searched: list[int] = []

    def multiply(
        self,
        packed: Tensor,
        x: Tensor,
        out_dtype: torch.dtype | None = None,
        **how: object,
    ) -> Tensor:
        """[tokens, out] for tokens [in, tokens]."""
        assert x.shape[1] % (16 if packed.dtype in DTYPES_8 else 8) == 0
        if out_dtype is not None and packed.dtype not in DTYPES_8:
            raise RuntimeError("out_dtype support only available for int8/fp8 inputs")
        return (x.t().float() @ packed.float().t()).to(out_dtype or packed.dtype)

    def search(
        self,
        packed: Tensor,
        x: Tensor,
        bias: Tensor | None,
        alpha: Tensor | None,
        out_dtype: torch.dtype | None,
        transpose_result: bool,
    ) -> int:
        """The number of an algorithm."""
        self.searched.append(x.shape[1])
        if packed.dtype == torch.float16 or not self.searches:
            raise RuntimeError("cuSPARSELt: internal error")
        self.multiply(packed, x, out_dtype)
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


DEFAULT_ONLY = [(0, 1, -1)]
SEARCHED = [(FOUND, 1, -1), *DEFAULT_ONLY]


@pytest.mark.parametrize("kind", DTYPES)
def test_a_dtype_is_offered_what_the_library_can_do_with_it(
    kind: str, fake: Callable[..., FakeLibrary]
) -> None:
    library = fake()
    weight = sparse_weight(128, 256, DTYPES[kind])
    offered = KERNEL.candidates(weight, random_tokens(weight, 20), 128)
    assert offered == (DEFAULT_ONLY if kind == "fp16" else SEARCHED)
    assert bool(library.searched) == (kind != "fp16")


@pytest.mark.parametrize("kind", DTYPES)
def test_the_default_algorithm_is_left_where_a_search_fails(
    kind: str, fake: Callable[..., FakeLibrary], caplog: pytest.LogCaptureFixture
) -> None:
    fake(searches=False)
    weight = sparse_weight(128, 256, DTYPES[kind])
    with caplog.at_level(logging.INFO):
        offered = KERNEL.candidates(weight, random_tokens(weight, 20), 128)
    assert offered == DEFAULT_ONLY
    if kind != "fp16":
        assert "search failed for 20 tokens by 128 x 256" in caplog.text


def test_small_odd_shapes_are_never_searched(
    fake: Callable[..., FakeLibrary],
) -> None:
    library = fake()
    weight = sparse_weight(96, 384, torch.bfloat16)
    assert KERNEL.candidates(weight, random_tokens(weight, 20), 96) == DEFAULT_ONLY
    assert not library.searched


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("tokens", [1, 20, 700])
def test_whatever_is_offered_is_the_product(
    tokens: int, kind: str, fake: Callable[..., FakeLibrary]
) -> None:
    fake()
    weight = sparse_weight(128, 256, DTYPES[kind])
    x = random_tokens(weight, tokens)
    for chosen in KERNEL.candidates(weight, x, 128):
        out = KERNEL.run(weight, x, 128, chosen)
        assert out.shape == (tokens, 128)
        assert out.dtype == output_dtype(weight.dtype)
        assert error(out, exact(weight, x)) < BOUND


@pytest.mark.parametrize("kind", DTYPES)
def test_a_weight_comes_back_by_products_with_ones(
    kind: str, fake: Callable[..., FakeLibrary], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    monkeypatch.setattr(cusparselt, "_UNPACKED", 100)
    weight = clear_negative_zeros(sparse_weight(96, 256, DTYPES[kind]))
    back = KERNEL.unpack(weight, (96, 256), DTYPES[kind])
    assert back.dtype == weight.dtype
    assert torch.equal(back.view(WORDS[back.dtype]), weight.view(WORDS[back.dtype]))
