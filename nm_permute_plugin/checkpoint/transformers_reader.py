# SPDX-License-Identifier: Apache-2.0
"""Have transformers 5 read sparse checkpoints: ``from_pretrained`` as ever."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from nm_permute_plugin.checkpoint.config import (
    QUANT_METHOD,
    Format,
    SparsityConfig,
    quantization_config,
    read_sparsity_config,
)
from nm_permute_plugin.checkpoint.directory import PARTS, stored_formats
from nm_permute_plugin.checkpoint.shards import Shard, open_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform

_SPARSE = ("sparse-24-bitmask", "sparse-bitmask")
_THREADS = 4


def register_reader() -> None:
    """
    Let ``AutoModel...from_pretrained`` read the two sparse formats, dense in memory.

    Only checkpoints with a ``sparsity_config`` of these formats are read here; every
    other one takes the way it took before. Calling it again changes nothing.

    :raises ImportError: without transformers 5, or without compressed-tensors
    """
    from transformers.quantizers import auto

    known = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD]
    if getattr(known, "reads_sparse", False):
        return
    config, quantizer = _classes()
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = config
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = quantizer


@lru_cache(maxsize=1)
def _classes() -> tuple[type, type]:
    """The two classes that transformers asks for, made when it is there."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )
    from transformers.quantizers import auto

    from nm_permute_plugin.checkpoint.transformers_conversions import (
        sparse_conversions,
        without_sparse,
    )

    stock_config = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD]
    stock_quantizer = auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD]

    # transformers compares this name with that of a config given to `from_pretrained`
    class CompressedTensorsConfig(stock_config):  # type: ignore[valid-type, misc]
        """The stock config, which keeps the sparsity block of sparse checkpoints."""

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
                return stock_config.from_dict(
                    config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs
                )
            rest = {k: v for k, v in inner.items() if k != "sparsity_config"}
            made = super().from_dict(rest, return_unused_kwargs=True, **kwargs)
            made[0].sparsity = read_sparsity_config(inner)
            return made if return_unused_kwargs else made[0]

    class SparseQuantizer(stock_quantizer):  # type: ignore[valid-type, misc]
        """The stock quantizer, with the sparse weights decompressed as they arrive."""

        def __new__(  # type: ignore[misc]
            cls, quantization_config: object, **kwargs: object
        ) -> object:
            if getattr(quantization_config, "sparsity", None) is None:
                return stock_quantizer(quantization_config, **kwargs)
            return super().__new__(cls)

        def _process_model_before_weight_loading(
            self,
            model: PreTrainedModel,
            checkpoint_files: Sequence[str] | None = None,
            **kwargs: object,
        ) -> None:
            self._files = _check_files(checkpoint_files or ())
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
            _check_names(self._model, self._files, renamed, self._sparsity)
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

    return CompressedTensorsConfig, SparseQuantizer


def _check_files(files: Sequence[str]) -> dict[str, Shard]:
    """Every tensor's file, once headers and checksums have been compared."""
    shards = [open_shard(Path(file)) for file in files]
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(Shard.check, shards))
    return {name: shard for shard in shards for name in shard.tensors}


def _check_names(
    model: PreTrainedModel,
    files: Mapping[str, Shard],
    renamed: Mapping[str, str],
    sparsity: SparsityConfig,
) -> None:
    """
    Every sparse weight has a place in the model, every promised module a weight.

    transformers fills weights that it does not find with random numbers.
    """
    expected = model.state_dict()
    formats = stored_formats(files)
    sources: dict[str, dict[Format, str]] = defaultdict(dict)
    for module, stored in formats.items():
        name = f"{module}.{PARTS[stored][0]}"
        sources[renamed[name]][stored] = module
        if stored != "dense" and renamed[name] not in expected:
            raise NotImplementedError(
                f"{files[name].path}: {module} is stored sparse, and "
                f"{type(model).__name__} has no weight of that name. Convert the "
                "checkpoint to dense first."
            )
    for target, kinds in sources.items():
        if len(kinds) > 1:
            modules = (f"{module} {stored}" for stored, module in kinds.items())
            raise NotImplementedError(
                f"{target} is made of weights that are stored in different ways: "
                f"{', '.join(modules)}. Convert the checkpoint to dense first."
            )
    for name in sparsity.targets or ():
        if "." in name and not name.startswith("re:") and name not in formats:
            raise ValueError(_missing(name))
    found = set(renamed.values())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for module_name, module in model.named_modules():
        weight = f"{module_name}.weight"
        if (
            isinstance(module, nn.Linear)
            and isinstance(getattr(module, "weight", None), torch.Tensor)
            and sparsity.promises(module_name)
            and weight not in found | tied
            and files
        ):
            raise ValueError(_missing(module_name))


def _missing(module: str) -> str:
    return (
        f"the checkpoint has no weight for {module}, which its sparsity_config says is "
        "sparse. It is damaged, or cut short."
    )
