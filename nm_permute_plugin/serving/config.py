# SPDX-License-Identifier: Apache-2.0
"""vLLM's config class for 2:4 checkpoints: it chooses each layer's method."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from nm_permute_plugin.checkpoint.config import (
    QUANT_METHOD,
    SparsityConfig,
    read_sparsity_config,
)
from nm_permute_plugin.serving.detect import NAME, is_ours, mode
from nm_permute_plugin.serving.experts import experts_method
from nm_permute_plugin.serving.layer_report import LayerReport
from nm_permute_plugin.serving.method import Sparse24LinearMethod
from nm_permute_plugin.serving.vllm_names import (
    DRAFT,
    CompressedTensorsConfig,
    LinearBase,
    QuantizeMethodBase,
    RoutedExperts,
    WeightsMapper,
)

logger = logging.getLogger(__name__)

_USUALLY_FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""What vLLM fuses where a model's class, as StableLM's, does not say what it fuses."""

_MISNAMED = ".attention.output.qkv_proj"
"""vLLM's BERT calls the checkpoint's ``attention.self`` by this name."""


class Sparse24Config(CompressedTensorsConfig):
    """vLLM's own config of a compressed-tensors checkpoint, plus the sparsity block."""

    sparsity: SparsityConfig
    report: LayerReport

    def get_name(self) -> str:
        """Return the name of the quantization method."""
        return NAME

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """
        Claim 2:4 checkpoints, and no others.

        :raises ValueError: if a 2:4 checkpoint is to be quantized while it is loaded
        """
        if not is_ours(hf_quant_cfg):
            return None
        if user_quant in (None, NAME, QUANT_METHOD):
            return NAME
        raise ValueError(
            f"--quantization {user_quant} would quantize this 2:4 checkpoint while it is "
            "loaded, which makes it dense. Leave it out; or quantize the checkpoint by "
            "llm-compressor's oneshot (FP8_DYNAMIC, W8A8), which keeps it 2:4; or serve "
            "it dense: nm-permute convert DIR OUT --format dense"
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Sparse24Config":
        """
        Read the config of a checkpoint.

        :param config: the ``quantization_config`` of its ``config.json``
        :raises ValueError: if the sparsity block is not that of a 2:4 checkpoint
        """
        sparsity = read_sparsity_config(config)
        if sparsity is None or not is_ours(config):
            raise ValueError(
                f"--quantization {NAME} is for 2:4 checkpoints; this one has the "
                f"sparsity_config {config.get('sparsity_config')}. Leave it out."
            )
        made: Sparse24Config = super().from_config({**config, "sparsity_config": {}})
        made.sparsity = sparsity
        made.report = LayerReport(logger.warning, logger.info)
        return made

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Translate the checkpoint's module names into vLLM's."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        targets = self.sparsity.targets
        targets = targets and tuple(_mapped(targets, hf_to_vllm_mapper))
        ignore = tuple(_mapped(self.sparsity.ignore, hf_to_vllm_mapper))
        update = {"targets": targets, "ignore": ignore}
        self.sparsity = self.sparsity.model_copy(update=update)

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        """
        Return a layer's stock method, wrapped in ours if the layer is 2:4.

        :raises NotImplementedError: if a head is stored sparse, or experts are that are
            quantized
        """
        prefix = prefix.removeprefix(".")  # vLLM's StableLM calls its head .lm_head
        module = prefix.removeprefix(DRAFT)
        stock = super().get_quant_method(layer, module)
        stored = self.sparsity.format != "dense"
        if isinstance(layer, LinearBase):
            sparse = tuple(map(self.sparsity.promises, self._fused(module)))
            if not any(sparse):
                return stock
            return Sparse24LinearMethod(
                stock, prefix, sparse, stored, mode(), self.report
            )
        if isinstance(layer, RoutedExperts):
            how = (self.sparsity, mode(), self.report)
            return experts_method(layer, prefix, stock, *how)
        kind = type(layer).__name__
        if kind == "ParallelLMHead" and stored and self.sparsity.promises(module):
            raise NotImplementedError(
                f"{prefix}, a {kind}, is stored as {self.sparsity.format}, which is "
                "served for linear layers and experts only. Write the checkpoint again: "
                "nm-permute convert DIR OUT --format dense"
            )
        return stock

    def _fused(self, module: str) -> list[str]:
        """List the checkpoint's modules that vLLM fuses into one layer."""
        owner, _, name = module.rpartition(".")
        if module.endswith(_MISNAMED):
            owner = f"{owner.removesuffix('output')}self"
        usual = _USUALLY_FUSED.get(name, [name])
        leaves = self.packed_modules_mapping.get(name, usual)
        return [f"{owner}.{leaf}" if owner else leaf for leaf in leaves]


def _mapped(entries: Iterable[str], mapper: WeightsMapper) -> Iterator[str]:
    """Translate module names; class names and patterns stay as they are."""
    for entry in entries:
        if entry.startswith("re:") or entry[:1].isupper():
            yield entry
        elif "." in entry:
            yield from mapper.apply_list([entry])
        else:  # such as lm_head: a mapper's prefixes end in a dot
            for name in mapper.apply_list([f"{entry}.weight"]):
                yield name.removesuffix(".weight")
