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
from nm_permute_plugin.checkpoint.tested_hosts import warn_if_untested
from nm_permute_plugin.checkpoint.transformers_conversions import (
    Decompress,
    with_sparse,
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

    def post_init(self) -> None:
        # Weights that are sparse alone are dense once they are read. The host says so in
        # a warning about compressed execution, unless it was asked for.
        if not self.is_quantized:
            self.dequantize = True
        super().post_init()

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
        warn_if_untested("transformers", "compressed-tensors")
        rest = {k: v for k, v in inner.items() if k != "sparsity_config"}
        made = super().from_dict(rest, return_unused_kwargs=True, **kwargs)
        made[0].sparsity = read_sparsity_config(inner)
        return made if return_unused_kwargs else made[0]


class SparseQuantizer(_STOCK_QUANTIZER):  # type: ignore[valid-type, misc]
    """Is the stock quantizer, and decompresses the sparse weights as they arrive."""

    reads_sparse = True

    # How transformers calls what is below differs from version to version: it is
    # passed on as it comes.

    def __new__(cls, *arguments: object, **options: object) -> object:  # type: ignore[misc]
        given = [*arguments, *options.values()]
        known = [one for one in given if isinstance(one, _STOCK_CONFIG)]
        if known and getattr(known[0], "sparsity", None) is None:
            return _STOCK_QUANTIZER(*arguments, **options)
        return super().__new__(cls)

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: object,
    ) -> None:
        self._files = check_files(checkpoint_files or ())
        self._model = model
        if self._is_quantized:
            super()._process_model_before_weight_loading(
                model, checkpoint_files=checkpoint_files, **kwargs
            )

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], *rest: object
    ) -> list[WeightTransform]:
        stock = weight_conversions
        if self._is_quantized:
            stock = super().update_weight_conversions(weight_conversions, *rest)
        everything = with_sparse(stock)
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

    def get_new_dtype(self, converter: WeightTransform, *rest: object) -> object:
        # values stay as they are stored until they are dense
        operations = getattr(converter, "operations", ())
        if any(isinstance(one, Decompress) for one in operations):
            return None
        return super().get_new_dtype(converter, *rest)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: object
    ) -> None:
        used = getattr(model, "_weight_conversions", None)
        if self._is_quantized:
            super()._process_model_after_weight_loading(model, **kwargs)
        else:
            self.remove_quantization_config(model)  # what is left is an ordinary model
        if used is not None:  # saving takes them back, and cannot do so with ours
            model._weight_conversions = without_sparse(used)

    @property
    def _is_quantized(self) -> bool:
        """Tells whether weights are, or the cache of keys and values."""
        config = self.quantization_config
        inner = config.quantization_config
        cached = inner is not None and inner.kv_cache_scheme is not None
        return cached or bool(config.is_quantized)

    @property
    def _sparsity(self) -> SparsityConfig:
        sparsity: SparsityConfig = self.quantization_config.sparsity
        return sparsity
