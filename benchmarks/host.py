# SPDX-License-Identifier: Apache-2.0
"""llm-compressor's own SparseGPT, on the benchmark's calibration text."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.data import Batch


def sparsegpt(
    model: nn.Module, folder: Path, batches: Sequence[Batch], pattern: NMPattern
) -> None:
    """
    Prune and update the weights by ``oneshot`` with the ``SparseGPTModifier``.

    :param model: loaded from ``folder``; perhaps folded since
    :param batches: of calibration text, handed over as they are
    :raises ModuleNotFoundError: without llm-compressor
    """
    # Here, because it is heavy and no other method needs it.
    from llmcompressor import oneshot, reset_session
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier

    modifier = SparseGPTModifier(
        sparsity=1 - pattern.density,
        mask_structure=f"{pattern.m - pattern.n}:{pattern.m}",  # it counts the zeros
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    reset_session()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        recipe=[modifier],
        dataset=DataLoader(list(batches), batch_size=None),
    )
    reset_session()  # it would keep the model in memory
