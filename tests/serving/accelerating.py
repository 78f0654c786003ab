# SPDX-License-Identifier: Apache-2.0
"""What the tests of ``accelerate`` look at: the bits of a model, and its linears."""

import torch
from torch import Tensor, nn

from nm_permute_plugin.serving.accelerated_linear import AcceleratedLinear

DTYPE = torch.bfloat16
BITS = torch.int16


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.view(BITS).clone() for name, t in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        torch.equal(left[name], right[name]) for name in left
    )


def accelerated(model: nn.Module) -> int:
    return sum(isinstance(m, AcceleratedLinear) for m in model.modules())
