# SPDX-License-Identifier: Apache-2.0
"""vLLM's config class for 2:4 checkpoints: a method for each of a model's layers."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.models.utils import WeightsMapper

from nm_permute_plugin.checkpoint.config import (
    QUANT_METHOD,
    SparsityConfig,
    read_sparsity_config,
)
from nm_permute_plugin.serving.detect import RollCall, is_ours, mode
from nm_permute_plugin.serving.method import Sparse24LinearMethod
from nm_permute_plugin.serving.plugin import NAME

logger = logging.getLogger(__name__)

_EXPERTS = ("FusedMoE", "RoutedExperts")
_MISNAMED = ".attention.output.qkv_proj"


class Sparse24Config(CompressedTensorsConfig):
    """vLLM's own config of a compressed-tensors checkpoint, with the sparsity block."""

    sparsity: SparsityConfig
    roll_call: RollCall

    def get_name(self) -> str:
        """The name of the quantization method."""
        return NAME

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a 2:4 checkpoint, and no other one."""
        wanted = user_quant in (None, NAME, QUANT_METHOD)
        return NAME if wanted and is_ours(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Sparse24Config":
        """
        The config of a checkpoint.

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
        made.roll_call = RollCall(logger.warning, logger.info)
        return made

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Turn module names of the checkpoint into vLLM's."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        targets = self.sparsity.targets
        self.sparsity = self.sparsity.model_copy(
            update={
                "targets": targets and tuple(_mapped(targets, hf_to_vllm_mapper)),
                "ignore": tuple(_mapped(self.sparsity.ignore, hf_to_vllm_mapper)),
            }
        )

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        """
        The stock method of a layer; where the checkpoint has it sparse, wrapped in ours.

        :raises NotImplementedError: for a head or for experts that are stored sparse
        """
        stock = super().get_quant_method(layer, prefix)
        stored = self.sparsity.format != "dense"
        if isinstance(layer, LinearBase):
            sparse = tuple(map(self.sparsity.promises, self._parts(prefix)))
            if not any(sparse):
                return stock
            return Sparse24LinearMethod(
                stock, prefix, sparse, stored, mode(), self.roll_call
            )
        kind = type(layer).__name__
        head = kind == "ParallelLMHead" and self.sparsity.promises(prefix)
        experts = kind in _EXPERTS and any(
            entry == "Linear" or entry.startswith(("re:", f"{prefix}."))
            for entry in self.sparsity.targets or ("Linear",)
        )
        if stored and (head or experts):
            raise NotImplementedError(
                f"{prefix}, a {kind}, is stored as {self.sparsity.format}, which is "
                "served for linear layers only. Write the checkpoint again: nm-permute "
                f"convert DIR OUT {'--dense-experts' if experts else '--format dense'}"
            )
        return stock

    def _parts(self, prefix: str) -> list[str]:
        """The modules of the checkpoint that are fused into one layer."""
        owner, _, name = prefix.rpartition(".")
        if prefix.endswith(_MISNAMED):  # vLLM's prefix for BERT's `attention.self`
            owner = f"{owner.removesuffix('output')}self"
        leaves = self.packed_modules_mapping.get(name, [name])
        return [f"{owner}.{leaf}" if owner else leaf for leaf in leaves]


def _mapped(entries: Iterable[str], mapper: WeightsMapper) -> Iterator[str]:
    """Module names go through the mapper; class names and patterns stay."""
    for entry in entries:
        if entry.startswith("re:") or entry[:1].isupper():
            yield entry
        elif "." in entry:
            yield from mapper.apply_list([entry])
        else:  # lm_head, say: prefixes of a mapper end in a dot
            for name in mapper.apply_list([f"{entry}.weight"]):
                yield name.removesuffix(".weight")
