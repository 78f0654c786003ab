# SPDX-License-Identifier: Apache-2.0
"""Packed weights are what the tensor cores' sparse product expects."""

import emulation
import pytest
import torch
from weights import DTYPES, sparse_weight

from nm_permute_plugin.checkpoint.codec import clear_negative_zeros
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.serving.kernels.kernel import DTYPES_8
from nm_permute_plugin.serving.kernels.mma_sp import MmaSp
from nm_permute_plugin.serving.kernels.packing import group_order, pack
from nm_permute_plugin.serving.kernels.triton_fallback import TritonDecode


@pytest.mark.parametrize("tokens", [1, 5, 8])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_warp_multiplies_packed_weights_exactly(
    dtype: torch.dtype, tokens: int
) -> None:
    weight = sparse_weight(64, 256, dtype, seed=tokens)
    x = sparse_weight(8, 256, dtype, seed=7)[:tokens]
    x = torch.where(x.float() == 0, torch.full_like(x, 3), x)
    out = emulation.multiply(pack(weight), x, 64)
    assert torch.equal(out, x.double() @ weight.double().t())


@pytest.mark.parametrize(
    ("dtype", "share"),
    [(torch.bfloat16, 9 / 16), (torch.float8_e4m3fn, 5 / 8), (torch.int8, 5 / 8)],
    ids=["bf16", "fp8", "int8"],
)
def test_packed_bytes_are_values_and_metadata_alone(
    dtype: torch.dtype, share: float
) -> None:
    weight = sparse_weight(96, 384, dtype)
    assert pack(weight).nbytes == share * weight.nbytes


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_the_tensor_cores_see_every_group_once(dtype: torch.dtype) -> None:
    assert sorted(group_order(dtype).flatten().tolist()) == list(range(32))


@pytest.mark.parametrize("shape", [(16, 128), (32, 192)])
def test_a_shape_that_has_no_whole_chunks_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="does not divide into chunks of 32 x 128"):
        pack(sparse_weight(*shape, torch.bfloat16))


def test_a_dense_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="is not 2:4 sparse"):
        pack(torch.ones(32, 128))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kernel", [MmaSp(), TritonDecode()], ids=lambda k: k.name)
def test_a_packed_weight_comes_back_bit_by_bit(kernel, dtype: torch.dtype) -> None:
    if dtype in DTYPES_8 and kernel.name == "triton":
        pytest.skip("the kernel has no 8-bit weights")
    weight = clear_negative_zeros(sparse_weight(96, 384, dtype))
    if dtype not in DTYPES_8:
        at = weight[-1].nonzero()
        weight[-1, at[0]], weight[-1, at[1]] = torch.inf, torch.nan
    back = kernel.unpack(kernel.prepare(weight), weight.shape, dtype)
    assert back.dtype == dtype
    assert torch.equal(back.view(WORDS[dtype]), weight.view(WORDS[dtype]))
