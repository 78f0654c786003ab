# SPDX-License-Identifier: Apache-2.0
"""Input norms of linears, from one pass of calibration text over the DENSE model."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

Batch = Mapping[str, Tensor]
"""Keyword arguments of the model's forward: ``input_ids`` and, where rows are padded,
``attention_mask``, each [rows, tokens]."""


def input_norms(
    model: nn.Module, linears: Iterable[str], batches: Iterable[Batch]
) -> dict[str, Float[Tensor, " in"]]:
    """
    ``||x_j||_2`` of every input channel of every linear, over all tokens of ``batches``.

    Squares are summed in float32; tokens that ``attention_mask`` hides do not count. No
    layer is pruned meanwhile: the same score on statistics of pruned layers is far worse.

    :param linears: module names
    :raises ValueError: if there are no tokens, if an activation is not finite, or if a
        linear never ran
    """
    linears = list(linears)
    squares = _Squares()
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(squares.add, name))
        for name in linears
    ]
    tokens = 0
    try:
        with torch.no_grad():
            for batch in tqdm(batches, desc="Measuring input norms"):
                batch = on_device(batch, model)
                counted = token_mask(batch)
                tokens += int(counted.sum())
                squares.padding = None if bool(counted.all()) else ~counted
                model(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if tokens == 0:
        raise ValueError("the calibration data holds no tokens; give the run a dataset")
    sums = squares.sums
    for name in linears:
        if name not in sums:
            raise ValueError(
                f"{name} never ran on the calibration data: add it to `ignore`"
            )
        if not bool(torch.isfinite(sums[name]).all()):
            channel = int((~torch.isfinite(sums[name])).nonzero()[0])
            raise ValueError(
                f"the activations that enter {name} are not finite (channel {channel}); "
                "load the model in bfloat16 or float32 and check its weights"
            )
    return {name: total.sqrt() for name, total in sums.items()}


def on_device(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch where the model's embedding lives."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def token_mask(batch: Batch) -> Tensor:
    """True for the tokens that count, [rows, tokens]."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


class _Squares:
    """
    Sums of squares of the inputs of linears, in float32.

    :ivar padding: the tokens of the batch at hand that do not count, if there are any
    """

    def __init__(self) -> None:
        self.sums: dict[str, Float[Tensor, " in"]] = {}
        self.padding: Bool[Tensor, "rows tokens"] | None = None

    def add(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares = inputs[0].detach().float().square()
        if self.padding is not None:
            squares = squares.masked_fill(self.padding[..., None], 0)
        total = squares.flatten(0, -2).sum(dim=0)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
