# SPDX-License-Identifier: Apache-2.0
"""vLLM's method for routed experts that are stored 2:4; it loads them as stored."""

import torch
from torch import Tensor

from nm_permute_plugin.checkpoint.config import SparsityConfig
from nm_permute_plugin.serving.detect import MODE_VARIABLE, Mode
from nm_permute_plugin.serving.expert_loading import REMEDY, Stack, must_be_cuttable
from nm_permute_plugin.serving.expert_table import SPARSE, dense_weights, table_of
from nm_permute_plugin.serving.kernel_table import KernelTable
from nm_permute_plugin.serving.kernels.experts import PackedExperts, run, unsupported
from nm_permute_plugin.serving.layer_report import LayerReport
from nm_permute_plugin.serving.vllm_names import (
    DRAFT,
    FusedMoEMethodBase,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    current_platform,
    envs,
    fused_experts,
    get_current_vllm_config,
)


class Sparse24ExpertsMethod(UnquantizedFusedMoEMethod):
    """
    Loads the 2:4 weights of a layer's experts, and serves them.

    Where our kernel runs and is faster for some number of tokens, the experts are packed
    for it. Elsewhere they are expanded, and vLLM's own method serves them.

    :param layer: the experts of one layer
    :param name: the layer's name
    :param report: is told how the layer is served
    """

    def __init__(
        self, layer: RoutedExperts, name: str, mode: Mode, report: LayerReport
    ) -> None:
        super().__init__(layer.moe_config)
        self.name = name
        self.mode = mode
        self.report = report
        self.is_dummy = False
        self.is_loaded = False
        self.shares_device = False
        self.stacks: tuple[Stack, ...] = ()
        self.table: KernelTable | None = None

    @property
    def is_monolithic(self) -> bool:
        """Whether the kernel chooses the experts as well."""
        return self.table is None and super().is_monolithic

    @property
    def supports_eplb(self) -> bool:
        """Whether vLLM may move experts between devices while it serves."""
        return False

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """
        Make vLLM's parameters; stored tensors take the place of its two weights.

        :raises ValueError: if tensor parallelism cuts the experts where they cannot be cut
        """
        sizes = (num_experts, hidden_size, intermediate_size_per_partition)
        super().create_weights(layer, *sizes, params_dtype, **extra_weight_attrs)
        hidden = self.moe.hidden_dim_unpadded
        inner = self.moe.intermediate_size_per_partition_unpadded
        must_be_cuttable(self.name, inner, self.moe.moe_parallel_config.tp_size)
        config = get_current_vllm_config()
        self.is_dummy = config.load_config.load_format == "dummy"
        self.shares_device = getattr(config.parallel_config, "enable_dbo", False)
        up, down = layer.w13_weight, layer.w2_weight
        *gates, below = projections(layer)
        self.stacks = (
            Stack("w13", tuple(up.shape), tuple(gates), inner, hidden),
            Stack("w2", tuple(down.shape), (below,), hidden, inner),
        )
        del layer.w13_weight, layer.w2_weight
        for stack in self.stacks:
            stack.add_to(layer, up, layer.weight_loader)
        self.report.expect(self.name)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """
        Choose a kernel for the loaded experts; pack them for ours, expand them for vLLM's.

        :raises ValueError: if an expert is damaged or missing
        """
        if self.is_dummy and not self.is_loaded:
            for stack in self.stacks:
                stack.make_two_of_four(layer)
        packed = None
        if not self.is_loaded:
            packed, reason = self._choose(layer)
            self.report.note(self.name, reason)
            self.is_loaded = True
        elif self.table is not None:
            packed = self._pack(layer)
        for number, stack in enumerate(self.stacks):
            if packed is None:
                stack.replace(layer, self.name)
            else:
                stack.keep(layer, packed[number])
        if self.table is None:
            if current_platform.is_cpu():
                # else vLLM leaves weights that are loaded later in the layout of the
                # checkpoint, which its kernel for CPUs does not read
                self.moe_kernel = None
            super().process_weights_after_loading(layer)

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: object = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Compute the weighted sum of each token's experts for x [tokens, hidden]."""
        if self.table is None:
            shared = (shared_experts, shared_experts_input)
            out: Tensor = super().apply(layer, x, topk_weights, topk_ids, *shared)
            return out
        # where CUDA graphs read them, also after others are loaded
        up, down = (stack.packed(layer, x.dtype) for stack in self.stacks)
        choice = self.table.choice(len(x))
        routing = (topk_weights, topk_ids)
        if choice.kernel == SPARSE:
            return run(x, up, down, *routing, choice.settings, layer.expert_map)
        where = {
            "global_num_experts": layer.global_num_experts,
            "expert_map": layer.expert_map,
        }
        return _fused_experts(x, *dense_weights(up, down), *routing, **where)

    def _choose(
        self, layer: RoutedExperts
    ) -> tuple[tuple[PackedExperts, PackedExperts] | None, str | None]:
        """Return packed weights, and set the table; or None and why experts are dense."""
        if reason := self._unsupported(layer):
            return None, reason
        up, down = self._pack(layer)
        try:
            table = table_of(up, down, self.moe.experts_per_token, _fused_experts)
        except RuntimeError as error:
            return None, f"no kernel for sparse experts runs: {error}"
        if SPARSE not in table.kernels:
            return None, "no sparse kernel is faster for its experts"
        self.table = table
        return (up, down), None

    def _pack(self, layer: RoutedExperts) -> tuple[PackedExperts, PackedExperts]:
        """Pack both weights that a layer holds as stored."""
        up, down = (stack.pack(layer, self.name) for stack in self.stacks)
        return up, down

    def _unsupported(self, layer: RoutedExperts) -> str | None:
        """Return why our kernel cannot serve the experts; None if it can."""
        if self.mode == "dense":
            return f"{MODE_VARIABLE} is dense"
        if not current_platform.is_cuda():
            return "no CUDA device"
        if getattr(envs, "VLLM_BATCH_INVARIANT", False):
            return "VLLM_BATCH_INVARIANT asks for one product at every batch size"
        moe = self.moe
        gates = ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
        reasons = {
            "its activation is not SiLU": layer.activation.value != "silu"
            or any(getattr(layer, name, None) is not None for name in gates),
            "its experts have biases": moe.has_bias,
            "it multiplies by routing weights first": layer.apply_router_weight_on_input,
            "LoRA adapters need vLLM's kernel": moe.is_lora_enabled,
            "its tokens are spread over devices": moe.moe_parallel_config.dp_size > 1
            or getattr(moe, "is_sequence_parallel", False),
            "two batches share a device": self.shares_device,
            "vLLM pads its experts": any(
                stack.shape[1:] != (stack.rows * len(stack.parts), stack.columns)
                for stack in self.stacks
            ),
        }
        found = next((reason for reason, holds in reasons.items() if holds), None)
        for stack in self.stacks:
            shape = (stack.shape[0], stack.rows * len(stack.parts), stack.columns)
            found = found or unsupported(shape, stack.stored(layer)[0])
        return found


def experts_method(
    layer: RoutedExperts,
    name: str,
    stock: FusedMoEMethodBase,
    sparsity: SparsityConfig,
    mode: Mode,
    report: LayerReport,
) -> FusedMoEMethodBase:
    """
    Return the method of a layer of experts: ours if they are stored 2:4, else vLLM's.

    :param stock: vLLM's own method for the layer
    :raises NotImplementedError: if they are quantized, or only some of them are 2:4
    """
    modules = [
        f"{name.removeprefix(DRAFT)}.{expert}.{projection}"
        for expert in range(layer.moe_config.num_logical_experts)
        for projection in projections(layer)
    ]
    sparse = [module for module in modules if sparsity.promises(module)]
    if not sparse or sparsity.format == "dense":
        return stock
    if len(sparse) != len(modules):
        dense = next(module for module in modules if module not in set(sparse))
        raise NotImplementedError(
            f"{name}: {sparse[0]} is stored as {sparsity.format} and {dense} is not; "
            f"vLLM holds the experts of a layer in one tensor. To serve it, {REMEDY}"
        )
    if type(stock) is not UnquantizedFusedMoEMethod:
        raise NotImplementedError(
            f"{name}: its experts are quantized ({type(stock).__name__}) and stored as "
            f"{sparsity.format}, which is served for experts of 16 bits only. To serve "
            f"it, {REMEDY}"
        )
    return Sparse24ExpertsMethod(layer, name, mode, report)


def projections(layer: RoutedExperts) -> list[str]:
    """List the checkpoint's names of an expert's linears: gate, up if it has one, down."""
    names = (
        getattr(layer, f"ckpt_{part}_proj_name") for part in ("gate", "up", "down")
    )
    return [str(name) for name in names if name is not None]


def _fused_experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    **where: object,
) -> Tensor:
    """Run vLLM's kernel of dense experts; ``where``: which experts are on this device."""
    out: Tensor = fused_experts(x, up, down, topk_weights, topk_ids, **where)
    return out
