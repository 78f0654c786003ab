# SPDX-License-Identifier: Apache-2.0
"""Extend the classes through which transformers reads quantized checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)
from transformers.quantizers import auto

from nm_permute_plugin.checkpoint.config import (
    QUANT_METHOD,
    SparsityConfig,
    quantization_config,
    read_sparsity_config,
)
from nm_permute_plugin.checkpoint.transformers_conversions import (
    sparse_conversions,
    without_sparse,
)
from nm_permute_plugin.checkpoint.transformers_reader import check_files, check_names

if TYPE_CHECKING:  # this runs while transformers is only partly imported
    from transformers import PreTrainedModel

_SPARSE = ("sparse-24-bitmask", "sparse-bitmask")
_STOCK_CONFIG = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD]
_STOCK_QUANTIZER = auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD]


# transformers compares this name with that of a config given to `from_pretrained`
class CompressedTensorsConfig(_STOCK_CONFIG):  # type: ignore[valid-type, misc]
    """Is the stock config, and keeps the sparsity block of sparse checkpoints."""

    reads_sparse = True
    sparsity: SparsityConfig | None = None

    @classmethod
    def from_dict(
        cls,
        config_dict: Mapping[str, object],
        return_unused_kwargs: bool = False,
        **kwargs: object,
    ) -> object:
        inner = quantization_config(config_dict) or config_dict
        block = inner.get("sparsity_config")
        if not isinstance(block, Mapping) or block.get("format") not in _SPARSE:
            return _STOCK_CONFIG.from_dict(
                config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs
            )
        rest = {k: v for k, v in inner.items() if k != "sparsity_config"}
        made = super().from_dict(rest, return_unused_kwargs=True, **kwargs)
        made[0].sparsity = read_sparsity_config(inner)
        return made if return_unused_kwargs else made[0]


class SparseQuantizer(_STOCK_QUANTIZER):  # type: ignore[valid-type, misc]
    """Is the stock quantizer, and decompresses the sparse weights as they arrive."""

    reads_sparse = True

    def __new__(  # type: ignore[misc]
        cls, quantization_config: object, **kwargs: object
    ) -> object:
        if getattr(quantization_config, "sparsity", None) is None:
            return _STOCK_QUANTIZER(quantization_config, **kwargs)
        return super().__new__(cls)

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: object,
    ) -> None:
        self._files = check_files(checkpoint_files or ())
        self._model = model
        if self.quantization_config.is_quantized:
            super()._process_model_before_weight_loading(
                model, checkpoint_files=checkpoint_files, **kwargs
            )

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform]
    ) -> list[WeightTransform]:
        stock = weight_conversions
        if self.quantization_config.is_quantized:
            stock = super().update_weight_conversions(weight_conversions)
        # of the converters only the first to match is used
        everything = [*sparse_conversions(weight_conversions), *stock]
        renamings = [e for e in everything if isinstance(e, WeightRenaming)]
        converters = [e for e in everything if isinstance(e, WeightConverter)]
        known = self._model.base_model_prefix, self._model.state_dict()
        renamed = {
            name: rename_source_key(name, renamings, converters, *known)[0]
            for name in self._files
        }
        check_names(self._model, self._files, renamed, self._sparsity)
        del self._model, self._files
        return everything

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: object
    ) -> None:
        # saving would take the conversions back, and compress what it cannot
        used = getattr(model, "_weight_conversions", None) or ()
        model._weight_conversions = without_sparse(used)
        if self.quantization_config.is_quantized:
            super()._process_model_after_weight_loading(model, **kwargs)
        else:
            model.is_quantized = False

    @property
    def _sparsity(self) -> SparsityConfig:
        sparsity: SparsityConfig = self.quantization_config.sparsity
        return sparsity
