# SPDX-License-Identifier: Apache-2.0
"""Tiny 2:4 checkpoints on disk, as llm-compressor leaves them: zeros stored."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside the tests
from checkpoint_files import MakeDense, quantize  # noqa: E402

TWO_FOUR = NMPattern(2, 4)


@pytest.fixture
def make_dense(tmp_path: Path, tiny_model) -> MakeDense:
    """A factory: ``make_dense("fp8", shard="20KB")`` is a checkpoint's directory."""

    def make(
        kind: str = "bf16",
        shard: str = "20KB",
        pattern: NMPattern = TWO_FOUR,
        keep_dense: tuple[str, ...] = ("lm_head",),
        **options: object,
    ) -> Path:
        dtype = torch.float16 if kind == "fp16" else torch.bfloat16
        # 52 channels are no whole number of bytes in a bitmask
        model = tiny_model("llama", dtype=dtype, **{"intermediate_size": 52} | options)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name not in keep_dense:
                weight = module.weight.data
                weight.masked_fill_(~nm_mask(weight.abs().float(), pattern), 0)
        path = tmp_path / f"dense-{kind}"
        model.save_pretrained(path, max_shard_size=shard)
        if kind in ("fp8", "int8"):
            quantize(path, kind)
        return path

    return make


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A directory with an old config, a file and a folder."""
    path = tmp_path / "target"
    (path / "more").mkdir(parents=True)
    for name in ("config.json", "notes.txt", "more/file"):
        (path / name).write_text("old")
    return path
