# SPDX-License-Identifier: Apache-2.0
"""vLLM's linear method for a 2:4 weight: it wraps vLLM's own method of the layer."""

from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from nm_permute_plugin.checkpoint.codec import decompress
from nm_permute_plugin.checkpoint.layout24 import FIRST_TWO, WORDS
from nm_permute_plugin.serving.detect import MODE_VARIABLE, NAME, Mode
from nm_permute_plugin.serving.layer_report import LayerReport
from nm_permute_plugin.serving.linear import SparseLinear, expect
from nm_permute_plugin.serving.product import Product, product_of, unsupported_precision
from nm_permute_plugin.serving.vllm_names import (
    BasevLLMParameter,
    LinearBase,
    LinearMethodBase,
    ModelWeightParameter,
    current_platform,
    envs,
    get_current_vllm_config,
    register_weight_loader_v2_supported_method,
)

STORED_TENSORS = ("compressed", "bitmask", "shape")
"""These parameters hold a stored weight until all of it has been loaded."""

_READ_BY_OTHERS = ("kv_b_proj",)
"""vLLM's attention reads the dense weight of these layers, so they stay dense."""


@register_weight_loader_v2_supported_method
class Sparse24LinearMethod(LinearMethodBase):
    """
    Loads a 2:4 weight, and multiplies by it with the fastest kernel.

    The stock method makes the weight and its scales, and serves the layer if no sparse
    kernel can. Weights that vLLM loads later (``reload_weights``) take the place of the
    first in memory, where captured CUDA graphs read them.

    :param stock: the method that vLLM would use if the layer were dense
    :param name: the layer's name
    :param sparse: for each part of a fused layer, whether it is 2:4
    :param stored: whether the 2:4 parts are stored as ``sparse-24-bitmask``
    :param report: is told how the layer is served
    """

    def __init__(
        self,
        stock: LinearMethodBase,
        name: str,
        sparse: tuple[bool, ...],
        stored: bool,
        mode: Mode,
        report: LayerReport,
    ) -> None:
        self.stock = stock
        self.name = name
        self.sparse = sparse
        self.stored = stored
        self.mode = mode
        self.report = report
        self.product: Product | None = None
        self.scale_dtype: torch.dtype | None = None
        self.is_loaded = False
        self.is_dummy = False

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
        Make the stock method's parameters; a stored weight's tensors replace the weight.

        :raises ValueError: if the stock method has no such weight, or tensor parallelism
            cuts it where it cannot be cut
        """
        loader = extra_weight_attrs["weight_loader"]
        self.axes = {"input_dim": 1, "output_dim": 0, "weight_loader": loader}
        local = (input_size_per_partition, output_partition_sizes)
        whole = (input_size, output_size)
        self.stock.create_weights(
            layer, *local, *whole, params_dtype, **extra_weight_attrs
        )
        self.widths = list(output_partition_sizes)
        config = get_current_vllm_config()
        self.is_dummy = config.load_config.load_format == "dummy"
        # vLLM keys its compiled graphs by its config: add what our graphs depend on.
        more = config.additional_config
        self.compiled_for = more.setdefault(NAME, []) if type(more) is dict else []
        self.report.expect(self.name)
        weight = getattr(layer, "weight", None)
        if weight is not None and self._dense_reason(layer) is None:
            expect(weight.data, self.mode)
        if not self.stored:
            return
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
        # zeros are no valid bitmask: tensors missing in the checkpoint are noticed
        bits = weight.new_zeros(rows, -(-columns // 8), dtype=torch.uint8)
        sizes = weight.new_zeros(2, len(self.sparse), dtype=torch.int64)
        if all(self.sparse):
            del layer.weight
        layer.compressed = ModelWeightParameter(data=values, **self.axes)
        layer.bitmask = ModelWeightParameter(data=bits, **self.axes)
        layer.shape = BasevLLMParameter(data=sizes, weight_loader=_load_shape)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """
        Unpack the loaded weight, and pack it for the kernels that multiply by it.

        :raises ValueError: if a stored weight is damaged or missing, or if weights that
            are loaded later cannot be served as the first ones are
        """
        if self.is_dummy and not self.is_loaded:
            self._make_two_of_four(layer)
        if self.stored:
            self._unpack(layer)
        if self.is_loaded:
            self._refill(layer)
            return
        self.is_loaded = True
        linear = self._prepare(layer)
        self.report.note(self.name, linear if isinstance(linear, str) else None)
        if isinstance(linear, str):
            self.stock.process_weights_after_loading(layer)
            return
        self.product = product_of(linear, layer)
        self._drop_weight(layer)
        scale = getattr(layer, "weight_scale", None)
        self.scale_dtype = None if scale is None else scale.dtype
        scales = "no scales" if scale is None else f"scales in {scale.dtype}"
        self.compiled_for.append(f"{self.name} {linear.signature}, {scales}")

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the layer's output for x [..., in]."""
        if self.product is None:
            out: Tensor = self.stock.apply(layer, x, bias)
            return out
        return self.product(layer, x, bias)

    def _refill(self, layer: LinearBase) -> None:
        """Put weights that were loaded later where the first are, served as these are."""
        if self.product is None:
            self.stock.process_weights_after_loading(layer)
            return
        linear = self._prepare(layer)
        if isinstance(linear, str):
            self._refuse(linear)
        product_of(linear, layer)  # brings the scales into shape
        scale, kept = getattr(layer, "weight_scale", None), self.scale_dtype
        if scale is not None and kept and scale.dtype.itemsize > kept.itemsize:
            self._refuse(f"{kept} holds the first ones' scales, not theirs")
        self.product.linear.refill(linear)
        self._drop_weight(layer)

    def _refuse(self, reason: str) -> NoReturn:
        raise ValueError(
            f"{self.name} is served sparse, and the weights that are loaded now cannot be: "
            f"{reason}. Start an engine with them instead."
        )

    def _drop_weight(self, layer: LinearBase) -> None:
        """Free the dense weight, which is packed elsewhere."""
        layer.weight = Parameter(layer.weight.data.new_empty(0), requires_grad=False)

    def _make_two_of_four(self, layer: LinearBase) -> None:
        """Give the random weights of ``--load-format dummy`` the pattern they stand for."""
        if self.stored:
            bits = layer.bitmask.data.fill_(FIRST_TWO)
            if 2 * layer.compressed.shape[1] % 8:
                bits[:, -1] &= 0x0F
            return
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.dtype in WORDS and weight.shape[1] % 4 == 0:
            words = weight.data.view(WORDS[weight.dtype])
            words.view(len(words), -1, 4)[:, :, 2:] = 0

    def _unpack(self, layer: LinearBase) -> None:
        """Replace the stored tensors by the dense weight."""
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
        for part in STORED_TENSORS:
            delattr(layer, part)

    def _decompress(self, values: Tensor, bits: Tensor) -> Tensor:
        """Return the dense weight, having checked that the stored one is 2:4 and whole."""
        shape = (len(values), 2 * values.shape[1])
        return decompress(values, bits, shape, self.name)

    def _prepare(self, layer: LinearBase) -> SparseLinear | str:
        """Return the layer's weight for sparse kernels, or why it is served dense."""
        if reason := self._dense_reason(layer):
            return reason
        # a stored weight has been found to be 2:4 when it was decompressed
        weight = layer.weight.data
        return SparseLinear.prepare(weight, self.mode, is_checked=self.stored)

    def _dense_reason(self, layer: LinearBase) -> str | None:
        """Return why a layer is served dense, however fast the kernels are, or None."""
        if self.mode == "dense":
            return f"{MODE_VARIABLE} is dense"
        if not current_platform.is_cuda():
            return "no CUDA device"
        if getattr(envs, "VLLM_BATCH_INVARIANT", False):
            return "VLLM_BATCH_INVARIANT asks for one product at every batch size"
        if not all(self.sparse):
            return "only a part of the fused layer is 2:4"
        if self.name.rpartition(".")[2] in _READ_BY_OTHERS:
            return "the attention reads its weight"
        return unsupported_precision(layer, self.stock)


def _load_shape(param: Parameter, loaded: Tensor, shard: object = None) -> None:
    """
    Copy the stored shape of a part [2, 1], which nothing reads, into a column of its own.

    vLLM counts the numbers that are copied into a layer that it loads again, and finishes
    the layer as soon as all of them have come.

    :param param: vLLM passes it by this name
    :param shard: "q", "k" or "v", the number of a part, or None for the only one
    """
    column = "qkv".find(shard) if isinstance(shard, str) else shard
    param[:, column if isinstance(column, int) else 0].copy_(loaded.flatten())
