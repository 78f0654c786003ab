# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the specs' zoo, and samples of what each takes."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nm_permute_plugin.specs.exactness import random_batch

sys.path.insert(0, str(Path(__file__).parents[1] / "specs"))
from zoo import ZOO, tiny  # noqa: E402

CASES = {case.id: case.values for case in ZOO}


def zoo_model(case: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of the zoo."""
    return tiny(*CASES[case], dtype)


def zoo_batches(model: nn.Module, count: int = 8) -> list[dict[str, Tensor]]:
    """Random batches that the model takes: two rows, two images, or one sample of both."""
    return [random_batch(model, seed=seed, tokens=40) for seed in range(count)]


def zoo_linears(model: nn.Module) -> list[str]:
    """The linears inside of layers: no head, no pooler, no classifier."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(part.isdigit() for part in name.split("."))
        if "merger" not in name
    ]
