# SPDX-License-Identifier: Apache-2.0
"""Scales and bias of 8-bit products; the pass in Triton is in ``test_triton.py``."""

import logging

import pytest
import torch
from torch import Tensor
from weights import error, exact, scales_for, sparse_weight

from nm_permute_plugin.serving.kernels import scaling
from nm_permute_plugin.serving.kernels.scaling import narrowest, scaled
from nm_permute_plugin.serving.tune import random_tokens

WEIGHT = sparse_weight(48, 64, torch.int8)
X = random_tokens(WEIGHT, 5)
SUMS = exact(WEIGHT, X).float()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_sums_are_scaled_compiled_and_not(
    out_dtype: torch.dtype, per_token: bool, per_channel: bool, bias: bool
) -> None:
    scales = scales_for(
        *(WEIGHT, 5, out_dtype),
        per_token=per_token,
        per_channel=per_channel,
        bias=bias,
    )
    expected = exact(WEIGHT, X, scales)
    torch.compiler.reset()
    for run in (scaled, torch.compile(scaled, backend="aot_eager", fullgraph=True)):
        out = run(SUMS, *scales)
        assert out.dtype == out_dtype
        assert error(out, expected) < 0.004  # rounded once, to bfloat16 at the worst


@pytest.mark.parametrize("name", ["scale_x", "scale_w"])
def test_scales_of_another_dtype_are_refused(name: str) -> None:
    scales = scales_for(WEIGHT, 5)
    half = scales._replace(**{name: getattr(scales, name).half()})
    with pytest.raises(ValueError, match=rf"{name} is torch.float16; it must be"):
        scaled(SUMS, *half)


def test_scales_that_were_stored_in_bfloat16_give_the_same_bits_in_it() -> None:
    scales = scales_for(WEIGHT, 5)
    stored = scales._replace(scale_w=scales.scale_w.bfloat16().float())
    narrow = stored._replace(scale_w=narrowest(stored.scale_w))
    assert narrow.scale_w.dtype == torch.bfloat16
    assert torch.equal(scaled(SUMS, *narrow), scaled(SUMS, *stored))


def test_scales_that_bfloat16_would_change_stay_as_they_are() -> None:
    scale = scales_for(WEIGHT, 5).scale_w
    assert narrowest(scale) is scale


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


class Damaged:
    """Passes for the Triton kernel; its cache on disk is damaged."""

    asked = 0

    def __getitem__(self, grid: tuple[int, int]) -> object:
        self.asked += 1
        raise ValueError("Expecting value: line 1 column 1 (char 0)")


def test_where_triton_fails_pytorch_scales_from_then_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Damaged()
    monkeypatch.setattr(scaling, "_installed", lambda: kernel)
    monkeypatch.setattr(scaling, "FAULTS", [])
    scales = scales_for(WEIGHT, 5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = scaled(SUMS.as_subclass(OnGpu), *scales)
            assert error(out.as_subclass(Tensor), exact(WEIGHT, X, scales)) < 0.008
    assert kernel.asked == 1
    (message,) = caplog.messages
    assert "Triton failed with ValueError: Expecting value: line 1" in message
