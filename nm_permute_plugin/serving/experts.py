# SPDX-License-Identifier: Apache-2.0
"""vLLM's method for routed experts that are stored 2:4; it loads them as stored."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from nm_permute_plugin.checkpoint.codec import decompress
from nm_permute_plugin.checkpoint.config import SparsityConfig
from nm_permute_plugin.serving.detect import MODE_VARIABLE, Mode
from nm_permute_plugin.serving.layer_report import LayerReport
from nm_permute_plugin.serving.method import FIRST_TWO, STORED_TENSORS
from nm_permute_plugin.serving.vllm_names import (
    FusedMoEMethodBase,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    current_platform,
    get_current_vllm_config,
)

Load = Callable[..., bool | None]
"""Copies a tensor of one expert, cut for this device, into a parameter of all experts."""

_REMEDY = (
    "write the checkpoint again: nm-permute convert DIR OUT --dense-experts, or "
    "--format dense"
)


class _Stack(NamedTuple):
    """
    A weight of all experts of a device, as vLLM stacks it.

    :param name: vLLM's name for it, as in ``w13_weight``
    :param shape: [experts, out, in], padded as vLLM wants it
    :param rows: of each part that is stored by itself, without padding
    :param starts: the row of ``shape`` at which each part begins
    :param columns: input channels without padding
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    starts: tuple[int, ...]
    columns: int


class Sparse24ExpertsMethod(UnquantizedFusedMoEMethod):
    """
    Loads the 2:4 weights of a layer's experts, and serves them.

    The experts are held as they are stored until all of them have been loaded. Then they
    are expanded, and vLLM's own method serves them.

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
        self.stacks: tuple[_Stack, ...] = ()

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
        load_format = get_current_vllm_config().load_config.load_format
        self.is_dummy = load_format == "dummy"
        up, down = layer.w13_weight, layer.w2_weight
        starts = (0, up.shape[1] // 2) if self.moe.is_act_and_mul else (0,)
        self.stacks = (
            _Stack("w13", tuple(up.shape), inner, starts, hidden),
            _Stack("w2", tuple(down.shape), hidden, (0,), inner),
        )
        del layer.w13_weight, layer.w2_weight
        loader: Load = layer.weight_loader
        for stack in self.stacks:
            parts = len(stack.starts)
            rows = stack.rows * parts
            values = up.new_empty(num_experts, rows, stack.columns // 2)
            # zeros are no valid bitmask: experts missing in the checkpoint are noticed
            bits = up.new_zeros(
                num_experts, rows, -(-stack.columns // 8), dtype=torch.uint8
            )
            shapes = up.new_zeros(num_experts, parts, 2, dtype=torch.int64)
            of = {"compressed": values, "bitmask": bits, "shape": shapes}
            for part, tensor in of.items():
                parameter = Parameter(tensor, requires_grad=False)
                load = _shape_loader(loader) if part == "shape" else _loader(loader)
                parameter.weight_loader = load  # type: ignore[attr-defined]
                layer.register_parameter(f"{stack.name}_{part}", parameter)
        self.report.expect(self.name)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """
        Expand the loaded experts, and prepare vLLM's kernels for them.

        :raises ValueError: if an expert is damaged or missing
        """
        if self.is_dummy and not self.is_loaded:
            self._make_two_of_four(layer)
        for stack in self.stacks:
            weight = self._expand(layer, stack)
            name = f"{stack.name}_weight"
            layer.register_parameter(name, Parameter(weight, requires_grad=False))
            for part in STORED_TENSORS:
                delattr(layer, f"{stack.name}_{part}")
        super().process_weights_after_loading(layer)
        if not self.is_loaded:
            self.report.note(self.name, self._reason())
        self.is_loaded = True

    def _reason(self) -> str:
        """Say why the experts are served dense."""
        if self.mode == "dense":
            return f"{MODE_VARIABLE} is dense"
        if not current_platform.is_cuda():
            return "no CUDA device"
        return "no sparse kernel for experts has been measured on a GPU yet"

    def _make_two_of_four(self, layer: RoutedExperts) -> None:
        """Give the random weights of ``--load-format dummy`` the pattern they stand for."""
        for stack in self.stacks:
            bits = getattr(layer, f"{stack.name}_bitmask").data.fill_(FIRST_TWO)
            if stack.columns % 8:
                bits[..., -1] &= 0x0F

    def _expand(self, layer: RoutedExperts, stack: _Stack) -> Tensor:
        """Return the dense weights of all experts, checked to be 2:4 and whole."""
        values = getattr(layer, f"{stack.name}_compressed").data
        bits = getattr(layer, f"{stack.name}_bitmask").data
        weight: Tensor = values.new_zeros(stack.shape)
        size = (stack.rows, stack.columns)
        for expert in range(len(values)):
            for part, start in enumerate(stack.starts):
                stored = slice(part * stack.rows, (part + 1) * stack.rows)
                name = (
                    f"{self.name}: {_part_name(layer, stack, part)} of expert {expert}"
                )
                found = decompress(
                    values[expert, stored], bits[expert, stored], size, name
                )
                rows = slice(start, start + stack.rows)
                weight[expert, rows, : stack.columns] = found
        return weight


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
    projections = [_projection(layer, part) for part in ("gate", "up", "down")]
    modules = [
        f"{name}.{expert}.{projection}"
        for expert in range(layer.moe_config.num_logical_experts)
        for projection in projections
        if projection is not None
    ]
    sparse = [module for module in modules if sparsity.promises(module)]
    if not sparse or sparsity.format == "dense":
        return stock
    if len(sparse) != len(modules):
        dense = next(module for module in modules if module not in set(sparse))
        raise NotImplementedError(
            f"{name}: {sparse[0]} is stored as {sparsity.format} and {dense} is not; "
            f"vLLM holds the experts of a layer in one tensor. To serve it, {_REMEDY}"
        )
    if type(stock) is not UnquantizedFusedMoEMethod:
        raise NotImplementedError(
            f"{name}: its experts are quantized ({type(stock).__name__}) and stored as "
            f"{sparsity.format}, which is served for experts of 16 bits only. To serve "
            f"it, {_REMEDY}"
        )
    return Sparse24ExpertsMethod(layer, name, mode, report)


def must_be_cuttable(name: str, inner: int, devices: int) -> None:
    """
    See that tensor parallelism cuts stored experts between whole bytes of their bitmasks.

    :param name: the layer's name
    :param inner: inner channels of an expert on each device
    :raises ValueError: if it does not
    """
    if inner % 8 and devices > 1:
        raise ValueError(
            f"{name}: the {inner * devices} inner channels of an expert over {devices} "
            f"devices are {inner} each; stored 2:4 experts can be cut at multiples of 8 "
            "only. Take another --tensor-parallel-size, or --enable-expert-parallel. "
            f"Or: {_REMEDY}"
        )


def _projection(layer: RoutedExperts, part: str) -> str | None:
    """Return the checkpoint's name of a projection of every expert."""
    found: str | None = getattr(layer, f"ckpt_{part}_proj_name")
    return found


def _part_name(layer: RoutedExperts, stack: _Stack, part: int) -> str:
    """Name the projection that is a part of a stack."""
    if stack.name == "w2":
        return str(_projection(layer, "down"))
    return str(_projection(layer, "up" if part else "gate"))


def _loader(stock: Load) -> Load:
    """Have vLLM cut values or bitmasks of an expert: like a weight, along the same axes."""

    def load(
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        more = {"shard_id": shard_id, "expert_id": expert_id}
        return stock(
            param, loaded_weight, "weight", **more, return_success=return_success
        )

    return load


def _shape_loader(stock: Load) -> Load:
    """
    Have vLLM copy the stored shape of an expert's part, which nothing reads.

    vLLM counts the numbers that are copied into a layer that it loads again, and finishes
    the layer as soon as all of them have come.
    """

    def load(
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        column = Parameter(param.data[:, int(shard_id == "w3")], requires_grad=False)
        more = {"shard_id": shard_id, "expert_id": expert_id}
        shape = loaded_weight.flatten()
        return stock(
            column, shape, "weight_shape", **more, return_success=return_success
        )

    return load
