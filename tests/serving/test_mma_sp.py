# SPDX-License-Identifier: Apache-2.0
"""The decode kernel compiles as it will on a card, and says so where it cannot."""

import pytest
import torch
from weights import DTYPES

from nm_permute_plugin.serving.kernels import mma_sp, nvrtc


@pytest.fixture
def compiler() -> None:
    """NVIDIA's run-time compiler, which needs no GPU."""
    try:
        nvrtc.compile_source("", "sm_90", {})
    except RuntimeError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("tiles", mma_sp._SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("architecture", ["sm_89", "sm_90"])
def test_the_kernel_compiles_to_machine_code(
    architecture: str, dtype: torch.dtype, tiles: int, compiler: None
) -> None:
    for shape in mma_sp.shapes(tiles, hopper=architecture == "sm_90"):
        code = mma_sp._machine_code(architecture, mma_sp._KINDS[dtype], shape)
        assert code.startswith(b"\x7fELF")


def test_what_does_not_compile_comes_with_the_log(compiler: None) -> None:
    with pytest.raises(RuntimeError, match="expected an expression"):
        nvrtc.compile_source("__device__ int x = ;", "sm_90", {})


@pytest.mark.parametrize("tokens", range(1, mma_sp.MOST_TOKENS + 1))
def test_every_few_tokens_have_settings_that_hold_them(tokens: int) -> None:
    for hopper in (True, False):
        found = mma_sp.shapes(-(-tokens // 8), hopper)
        assert found
        for shape in found:
            assert shape.tiles * 8 >= tokens
            assert shape.warps_n * shape.warps_k <= 16
            static = shape.warps_n * shape.warps_k * 8 * 36 * 4
            assert shape.ring_bytes(0) + static < 227 << 10
