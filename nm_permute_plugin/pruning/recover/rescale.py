# SPDX-License-Identifier: Apache-2.0
"""One factor for every row of kept weights, in closed form, from one pass of the data."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import (
    Batch,
    counted_rows,
    forward,
    on_device,
    token_mask,
    without_padding,
)
from nm_permute_plugin.pruning.recover.student import Student, Values
from nm_permute_plugin.pruning.running.masked import linear
from nm_permute_plugin.specs.conv1d import bias_of


def rescaled(student: Student, batches: Sequence[Batch]) -> Values:
    """
    The kept weights, every row times the factor that gives it the dense output's energy.

    With ``y = x W^T`` and ``z = x (W * mask)^T`` over all tokens or patches that
    ran through the dense model, row ``r`` is multiplied by
    ``sqrt(sum(y_r^2) / sum(z_r^2))``; by 1 where ``z_r`` is 0. Biases stay as they are.
    The least squares fit, ``sum(y_r z_r) / sum(z_r^2)``, made the whole model worse.
    """
    sums: dict[str, Float[Tensor, "2 _out"]] = {}

    def add(
        name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        if not counts:
            return
        y = counted_rows(output, mask).float()
        bias = bias_of(module)
        if bias is not None:
            y = y - bias.float()
        x = counted_rows(inputs[0], mask)
        z = F.linear(x, student.values[f"{name}.weight"]).float()
        new = torch.stack([y.square().sum(0), z.square().sum(0)])
        sums[name] = sums[name] + new if name in sums else new

    with ExitStack() as hooks, torch.no_grad():
        for name in student.linears:
            module = linear(student.model, name)
            hook = module.register_forward_hook(partial(add, name))
            hooks.callback(hook.remove)
        for _, batch, is_own in ranks.bar(ranks.dealt(batches), desc="Rescaling rows"):
            counts = is_own
            for part in without_padding(batch):
                mask = token_mask(part)  # of a sample with images: that is not cut
                forward(student.model, on_device(part, student.model))
    sums = dict(zip(sums, ranks.totals(list(sums.values())), strict=True))
    values: Values = {}
    for name in student.linears:
        dense, pruned = sums[name]
        factor = torch.where(pruned > 0, (dense / pruned).sqrt(), 1.0)
        values[f"{name}.weight"] = (
            student.values[f"{name}.weight"].float() * factor[:, None]
        )
    return values
