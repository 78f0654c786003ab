# SPDX-License-Identifier: Apache-2.0
"""The decode kernel compiles as it will on a card, and says so where it cannot."""

from itertools import product

import pytest
import torch
from weights import DTYPES

from nm_permute_plugin.serving.kernels import mma_sp, nvidia


@pytest.fixture
def compiler() -> None:
    """NVIDIA's run-time compiler, which needs no GPU."""
    try:
        nvidia.compile_source("", "sm_90", {})
    except RuntimeError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("tiles", mma_sp._BLOCK_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_the_kernel_compiles_to_machine_code(
    capability: tuple[int, int], dtype: torch.dtype, tiles: int, compiler: None
) -> None:
    kind = mma_sp._KINDS[dtype]
    for shape in mma_sp.block_shapes(tiles, kind, capability):
        architecture = shape.architecture(capability)
        code = mma_sp._machine_code(architecture, kind, shape)
        assert code.startswith(b"\x7fELF")


def test_what_does_not_compile_comes_with_the_log(compiler: None) -> None:
    with pytest.raises(RuntimeError, match="expected an expression"):
        nvidia.compile_source("__device__ int x = ;", "sm_90", {})


@pytest.mark.parametrize("tokens", range(1, mma_sp.MOST_TOKENS + 1))
def test_every_few_tokens_have_settings_that_hold_them(tokens: int) -> None:
    for capability, kind in product([(8, 0), (8, 9), (9, 0), (10, 0)], range(4)):
        found = mma_sp.block_shapes(-(-tokens // 8), kind, capability)
        assert found
        for shape in found:
            assert shape.tiles * 8 >= tokens
            assert shape.warps_n * shape.warps_k <= 16
            assert shape.shared_bytes(kind) < 227 << 10


def test_only_hopper_has_tokens_in_stages_and_only_in_16_bits() -> None:
    for capability, kind in product([(8, 9), (9, 0), (10, 0)], range(4)):
        staged = [s for s in mma_sp.block_shapes(8, kind, capability) if s.stages]
        assert bool(staged) == (capability == (9, 0) and kind < 2)
        assert all(s.architecture(capability) == "sm_90a" for s in staged)
        assert all(s.warps_n % 4 == 0 for s in staged)
