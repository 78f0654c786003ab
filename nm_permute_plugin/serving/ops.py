# SPDX-License-Identifier: Apache-2.0
"""The one operator that compiled models and captured graphs see."""

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernel_table import Plan
from nm_permute_plugin.serving.kernels.cusparselt import CuSparseLt
from nm_permute_plugin.serving.kernels.dense import Dense
from nm_permute_plugin.serving.kernels.kernel import Kernel, sums_dtype
from nm_permute_plugin.serving.kernels.mma_sp import MmaSp
from nm_permute_plugin.serving.kernels.triton_fallback import TritonDecode

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (Dense(), CuSparseLt(), MmaSp(), TritonDecode())
}

PLANS: dict[str, Plan] = {}
"""By weight's shape and dtype. An operator takes tensors and plain values: the plan's
name is all that a compiled graph holds, the same for all layers of a shape."""


def _sparse24_linear(x: Tensor, forms: list[Tensor], plan: str) -> Tensor:
    """
    [tokens, out]: ``x @ weight.T`` by the kernel that is fastest for the tokens.

    :param x: [tokens, in], of the weight's dtype
    :param forms: the weight as each of the plan's kernels wants it, in their order
    :param plan: the name of one of ``PLANS``
    :return: of ``sums_dtype``
    """
    chosen, tokens = PLANS[plan], x.shape[0]
    if not tokens:
        return _fake(x, forms, plan)
    way = chosen.way(tokens)
    form = forms[chosen.kernels.index(way.kernel)]
    with torch.cuda.device_of(x):
        return KERNELS[way.kernel].run(form, x, chosen.out_features, way.settings)


def _fake(x: Tensor, forms: list[Tensor], plan: str) -> Tensor:
    """What the operator returns, of any values."""
    # Not len(x): a compiled graph, too, is for any number of tokens.
    size = (x.shape[0], PLANS[plan].out_features)
    return x.new_empty(size, dtype=sums_dtype(x.dtype))


# Not torch.library.custom_op, whose calls cost the CPU more: a prompt that no graph was
# captured for waits for them in every layer.
_LIBRARY = torch.library.Library("nm_permute", "DEF")
_SCHEMA = torch.library.infer_schema(_sparse24_linear, mutates_args=())
_LIBRARY.define(f"sparse24_linear{_SCHEMA}")
_LIBRARY.impl("sparse24_linear", _sparse24_linear, "CompositeExplicitAutograd")
torch.library.register_fake("nm_permute::sparse24_linear", _fake, lib=_LIBRARY)
sparse24_linear = torch.ops.nm_permute.sparse24_linear.default
