# SPDX-License-Identifier: Apache-2.0
"""The block shapes of the decode kernel fit their card; what does not compile is told."""

from itertools import product

import pytest
from cards import CARDS

from nm_permute_plugin.serving.kernels import mma_sp, nvidia


@pytest.fixture
def compiler() -> None:
    """NVIDIA's run-time compiler, which needs no GPU."""
    try:
        nvidia.compile_source("", "sm_90", {})
    except RuntimeError as missing:
        pytest.skip(str(missing))


def test_what_does_not_compile_comes_with_the_log(compiler: None) -> None:
    with pytest.raises(RuntimeError, match="expected an expression"):
        nvidia.compile_source("__device__ int x = ;", "sm_90", {})


@pytest.mark.parametrize("tokens", range(1, mma_sp.MOST_TOKENS + 1))
def test_every_few_tokens_have_settings_that_hold_them(tokens: int) -> None:
    for card, kind in product(CARDS.values(), range(4)):
        found = mma_sp.block_shapes(-(-tokens // 8), kind, card)
        assert found
        for shape in found:
            assert shape.tiles * 8 >= tokens
            assert shape.warps_n * shape.warps_k <= 16
            assert shape.shared_bytes(kind) <= card.shared_bytes


def test_only_hopper_has_tokens_in_stages_and_only_in_16_bits() -> None:
    for (name, card), kind in product(CARDS.items(), range(4)):
        staged = [s for s in mma_sp.block_shapes(8, kind, card) if s.stages]
        assert bool(staged) == (name == "sm_90" and kind < 2)
        assert all(s.architecture(card.capability) == "sm_90a" for s in staged)
        assert all(s.warps_n % 4 == 0 for s in staged)
