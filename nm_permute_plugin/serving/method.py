# SPDX-License-Identifier: Apache-2.0
"""vLLM's linear method for a 2:4 weight: the stock one, with our weight in it."""

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter
from vllm.platforms import current_platform

from nm_permute_plugin.checkpoint.codec import decompress
from nm_permute_plugin.checkpoint.layout24 import WORDS
from nm_permute_plugin.serving.detect import MODE_VARIABLE, RollCall
from nm_permute_plugin.serving.linear import Mode, SparseLinear
from nm_permute_plugin.serving.plugin import NAME
from nm_permute_plugin.serving.product import Product, product_of, unsupported

PARTS = ("compressed", "bitmask", "shape")
"""The parameters that hold a stored weight until it has been loaded."""

_READ_BY_OTHERS = ("kv_b_proj",)  # whose weight the attention takes apart


@register_weight_loader_v2_supported_method
class Sparse24LinearMethod(LinearMethodBase):
    """
    Loads a 2:4 weight, then multiplies with it in the fastest way there is.

    The stock method makes weight and scales, and does all the work where there is no
    sparse product.

    :param stock: vLLM's method for the layer were it dense
    :param name: the layer
    :param sparse: for each part of a fused layer, whether it is 2:4
    :param stored: whether the 2:4 parts are stored as ``sparse-24-bitmask``
    """

    def __init__(
        self,
        stock: LinearMethodBase,
        name: str,
        sparse: tuple[bool, ...],
        stored: bool,
        mode: Mode,
        roll_call: RollCall,
    ) -> None:
        self.stock = stock
        self.name = name
        self.sparse = sparse
        self.stored = stored
        self.mode = mode
        self.roll_call = roll_call
        self.product: Product | None = None

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """
        The stock method's parameters; those of a stored weight in place of the weight.

        :raises ValueError: if the stock method has no such weight, or tensor parallelism
            cuts it where it cannot be cut
        """
        loader = extra_weight_attrs["weight_loader"]
        self.axes = {"input_dim": 1, "output_dim": 0, "weight_loader": loader}
        self.stock.create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        self.widths = list(output_partition_sizes)
        # vLLM finds compiled graphs again by its config: what is sparse belongs there.
        config = get_current_vllm_config().additional_config
        self.compiled_for = config.setdefault(NAME, []) if type(config) is dict else []
        self.roll_call.expect(self.name)
        if not self.stored:
            return
        weight = getattr(layer, "weight", None)
        if weight is None or weight.dtype not in WORDS:
            raise ValueError(
                f"{self.name} is stored as sparse-24-bitmask, but its quantization has "
                "no weight of 8 bits or more. The config of the checkpoint is damaged."
            )
        rows, columns = weight.shape
        if columns % 8 and columns != input_size:
            raise ValueError(
                f"{self.name}: {input_size} input channels over {input_size // columns} "
                f"devices are {columns} each; a stored 2:4 weight can be cut at "
                "multiples of 8 only. Take another --tensor-parallel-size, or a dense "
                "checkpoint: nm-permute convert DIR OUT --format dense"
            )
        if len(self.sparse) not in (1, len(self.widths)) and not all(self.sparse):
            raise ValueError(
                f"{self.name} is fused of {len(self.widths)} parts, which the checkpoint "
                f"has as {len(self.sparse)}, some 2:4 and some not. Turn it into a "
                "dense one: nm-permute convert DIR OUT --format dense"
            )
        values = weight.new_empty(rows, columns // 2)
        # all zero is no valid bitmask: parts that the checkpoint lacks are found out
        bits = weight.new_zeros(rows, -(-columns // 8), dtype=torch.uint8)
        sizes = weight.new_zeros(2, 1, dtype=torch.int64)
        if all(self.sparse):
            del layer.weight
        for part, data in (("compressed", values), ("bitmask", bits)):
            parameter = ModelWeightParameter(data=data, **self.axes)
            layer.register_parameter(part, parameter)
        layer.register_parameter(
            "shape", BasevLLMParameter(data=sizes, weight_loader=_no_load)
        )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """
        Turn what was loaded into what is multiplied with.

        :raises ValueError: if a stored weight is damaged, or missing
        """
        if self.stored:
            self._unpack(layer)
        linear, reason = self._prepare(layer)
        self.roll_call.note(self.name, reason)
        if linear is None:
            self.stock.process_weights_after_loading(layer)
            return
        self.product = product_of(linear, layer)
        layer.weight = Parameter(layer.weight.data.new_empty(0), requires_grad=False)
        scale = getattr(layer, "weight_scale", None)
        scales = "no scales" if scale is None else f"scales in {scale.dtype}"
        self.compiled_for.append(f"{self.name} {linear.signature}, {scales}")

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output for x [..., in]."""
        if self.product is None:
            out: Tensor = self.stock.apply(layer, x, bias)
            return out
        return self.product(layer, x, bias)

    def _unpack(self, layer: LinearBase) -> None:
        """Put the dense weight in the place of the stored parts."""
        values, bits = layer.compressed.data, layer.bitmask.data
        if all(self.sparse):
            weight = self._decompress(values, bits)
            layer.weight = ModelWeightParameter(data=weight, **self.axes)
        else:
            parts = (part.split(self.widths) for part in (layer.weight, values, bits))
            for is_sparse, (row, value, bit) in zip(
                self.sparse, zip(*parts, strict=True), strict=True
            ):
                if is_sparse:
                    row.data.copy_(self._decompress(value, bit))
        for part in PARTS:
            delattr(layer, part)

    def _decompress(self, values: Tensor, bits: Tensor) -> Tensor:
        """The dense weight; what is damaged, or missing, is found out here."""
        shape = (len(values), 2 * values.shape[1])
        return decompress(values, bits, shape, self.name)

    def _prepare(self, layer: LinearBase) -> tuple[SparseLinear | None, str | None]:
        """The weight for sparse products, or why there are none."""
        reason = None
        if self.mode == "dense":
            reason = f"{MODE_VARIABLE} is dense"
        elif not current_platform.is_cuda():
            reason = "no CUDA device"
        elif getattr(envs, "VLLM_BATCH_INVARIANT", False):
            reason = "VLLM_BATCH_INVARIANT asks for one product at every batch size"
        elif not all(self.sparse):
            reason = "only a part of the fused layer is 2:4"
        elif self.name.rpartition(".")[2] in _READ_BY_OTHERS:
            reason = "the attention reads its weight"
        else:
            reason = unsupported(layer, self.stock)
        if reason is not None:
            return None, reason
        linear = SparseLinear.prepare(self.name, layer.weight.data, self.mode)
        return linear, None if linear else "no kernel takes it, as logged above"


def _no_load(parameter: Parameter, loaded: Tensor, shard: object = None) -> None:
    """The shape is the model's: the sizes of the other parts are held against it."""
