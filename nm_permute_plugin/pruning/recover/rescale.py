# SPDX-License-Identifier: Apache-2.0
"""One number a row of kept weights, in closed form, from one pass of text."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nm_permute_plugin.pruning.recover.student import KeptWeights, Values
from nm_permute_plugin.pruning.running.masked import linear
from nm_permute_plugin.pruning.statistics import (
    Batch,
    counted_rows,
    forward,
    on_device,
    token_mask,
)
from nm_permute_plugin.specs.conv1d import bias_of


def rescaled(kept: KeptWeights, batches: Sequence[Batch]) -> Values:
    """
    The kept weights, every row times the number that gives it the dense output's energy.

    With ``y = x W^T`` and ``z = x (W * mask)^T`` over all tokens or patches that
    ran through the dense model, row ``r`` is multiplied by
    ``sqrt(sum(y_r^2) / sum(z_r^2))``; by 1 where ``z_r`` is 0. Biases stay as they are.
    The least squares fit, ``sum(y_r z_r) / sum(z_r^2)``, made the whole model worse.
    """
    sums = _Sums(kept)
    hooks = [
        linear(kept.model, name).register_forward_hook(partial(sums.add, name))
        for name in kept.linears
    ]
    try:
        with torch.no_grad():
            for batch in tqdm(batches, desc="Rescaling rows"):
                batch = on_device(batch, kept.model)
                sums.counted = token_mask(batch)
                forward(kept.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        f"{name}.weight": kept.values[f"{name}.weight"].float()
        * sums.factor(name)[:, None]
        for name in kept.linears
    }


class _Sums:
    """``sum(y^2)`` and ``sum(z^2)`` of every output row, in float32."""

    def __init__(self, kept: KeptWeights) -> None:
        self._kept = kept
        self._sums: dict[str, Float[Tensor, "2 _out"]] = {}
        self.counted = torch.empty(0)

    def add(
        self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        x = counted_rows(inputs[0], self.counted)
        y = counted_rows(output, self.counted).float()
        bias = bias_of(module)
        if bias is not None:
            y = y - bias.float()
        z = F.linear(x, self._kept.values[f"{name}.weight"]).float()
        new = torch.stack([y.square().sum(0), z.square().sum(0)])
        self._sums[name] = self._sums[name] + new if name in self._sums else new

    def factor(self, name: str) -> Float[Tensor, " _out"]:
        dense, pruned = self._sums[name]
        return torch.where(pruned > 0, (dense / pruned).sqrt(), 1.0)
