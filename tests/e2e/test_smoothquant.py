# SPDX-License-Identifier: Apache-2.0
"""llm-compressor's SmoothQuant after the fold: the same function, the same zeros."""

from pathlib import Path

import pytest
import torch
from helpers import modifier, ours
from transformers import AutoModelForCausalLM

from nm_permute_plugin.checkpoint.verify import verify

pytestmark = pytest.mark.slow

PRUNE = ours(method="search")
SMOOTH = modifier(
    "smoothing", "SmoothQuantModifier", smoothing_strength=0.5, ignore=["lm_head"]
)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_smoothing_moves_scales_and_no_zero(
    tiny_checkpoint, run_oneshot, tokens, tmp_path: Path, architecture: str
) -> None:
    folder = tiny_checkpoint(architecture)
    run_oneshot(folder, PRUNE, tmp_path / "plain")
    run_oneshot(folder, PRUNE + SMOOTH, tmp_path / "smooth")
    plain, smooth = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        for name in ("plain", "smooth")
    )
    with torch.no_grad():
        torch.testing.assert_close(
            smooth(tokens).logits, plain(tokens).logits, atol=1e-4, rtol=1e-4
        )
    assert verify(tmp_path / "smooth").good
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = plain.get_parameter(name), smooth.get_parameter(name)
    assert torch.equal(before == 0, after == 0)
    assert not torch.allclose(before, after)
