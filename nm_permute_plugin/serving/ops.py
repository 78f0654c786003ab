# SPDX-License-Identifier: Apache-2.0
"""The custom operator that compiled models and CUDA graphs call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nm_permute_plugin.serving.kernel_table import KernelTable
from nm_permute_plugin.serving.kernels.cusparselt import CuSparseLt
from nm_permute_plugin.serving.kernels.dense import Dense
from nm_permute_plugin.serving.kernels.kernel import Kernel, output_dtype
from nm_permute_plugin.serving.kernels.mma_sp import MmaSp
from nm_permute_plugin.serving.kernels.triton_fallback import TritonDecode

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (Dense(), CuSparseLt(), MmaSp(), TritonDecode())
}

TABLES: dict[str, KernelTable] = {}
"""The kernel tables of this process by name, which says a weight's shape, dtype and allowed
kernels. It is global since an operator takes tensors and plain values only: a compiled
graph holds a table's name, which all layers of the same shape share."""


def multiply(x: Tensor, packed: list[Tensor], table_name: str) -> Tensor:
    """
    Compute ``x @ weight.T`` by the kernel that is fastest for the number of tokens.

    ``sparse24_linear`` is the same as an operator, which graphs can hold.

    :param x: [tokens, in], of the weight's dtype
    :param packed: the weight, packed for each of the table's kernels in their order
    :param table_name: the key of the kernel table in ``TABLES``
    :return: [tokens, out], of ``output_dtype``
    """
    table, tokens = TABLES[table_name], x.shape[0]
    if not tokens:
        return _fake(x, packed, table_name)
    choice = table.choice(tokens)
    weight = packed[table.kernels.index(choice.kernel)]
    run = KERNELS[choice.kernel].run
    with torch.cuda.device_of(x):
        return run(weight, x, table.out_features, choice.settings)


def unpack(
    packed: list[Tensor],
    names: Sequence[str],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """
    Return the weight [out, in] that was packed for some kernels.

    :param names: the kernels
    :param shape: [out, in]
    :param dtype: the weight's dtype
    """
    # cuSPARSELt's layout is not ours: the others give back infinite values as well
    name = min(names, key=lambda name: name == "cusparselt")
    return KERNELS[name].unpack(packed[names.index(name)], shape, dtype)


def _fake(x: Tensor, packed: list[Tensor], table_name: str) -> Tensor:
    """Return a tensor like the operator's output, with arbitrary values."""
    # Not len(x): a compiled graph is for any number of tokens.
    size = (x.shape[0], TABLES[table_name].out_features)
    return x.new_empty(size, dtype=output_dtype(x.dtype))


# Not torch.library.custom_op, whose calls take the CPU longer: prompts without a captured
# graph wait for them in every layer.
_LIBRARY = torch.library.Library("nm_permute", "DEF")
_SCHEMA = torch.library.infer_schema(multiply, mutates_args=())
_LIBRARY.define(f"sparse24_linear{_SCHEMA}")
_LIBRARY.impl("sparse24_linear", multiply, "CompositeExplicitAutograd")
torch.library.register_fake("nm_permute::sparse24_linear", _fake, lib=_LIBRARY)
sparse24_linear = torch.ops.nm_permute.sparse24_linear.default
