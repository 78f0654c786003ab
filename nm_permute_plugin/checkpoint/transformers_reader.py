# SPDX-License-Identifier: Apache-2.0
"""Have transformers 5 read sparse checkpoints: ``from_pretrained`` as ever."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from nm_permute_plugin.checkpoint.config import QUANT_METHOD, Format, SparsityConfig
from nm_permute_plugin.checkpoint.directory import PARTS, refuse_missing, stored_formats
from nm_permute_plugin.checkpoint.shards import Shard, open_shard, refuse_mixture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_THREADS = 4  # that compare the checksums of files


def register_reader() -> None:
    """
    Lets ``AutoModel...from_pretrained`` read the two sparse formats, dense in memory.

    Only checkpoints with a ``sparsity_config`` of these formats are read here; every
    other one takes the way it took before. Calling it again changes nothing.

    :raises ImportError: without transformers 5, or without compressed-tensors
    """
    from transformers.quantizers import auto

    known = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD]
    if getattr(known, "reads_sparse", False):
        return
    from nm_permute_plugin.checkpoint import transformers_quantizer as ours

    config = ours.CompressedTensorsConfig
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = config
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = ours.SparseQuantizer


def check_files(files: Sequence[str]) -> dict[str, Shard]:
    """Compares headers and checksums, and returns every tensor's file."""
    refuse_missing(map(Path, files))
    shards = [open_shard(Path(file)) for file in files]
    refuse_mixture(shards)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(Shard.check, shards))
    return {name: shard for shard in shards for name in shard.tensors}


def check_names(
    model: PreTrainedModel,
    files: Mapping[str, Shard],
    renamed: Mapping[str, str],
    sparsity: SparsityConfig,
) -> None:
    """
    Checks that every sparse weight has a place in the model, and every promised module
    a weight.

    transformers fills weights that it does not find with random numbers. A model of
    another class than the one that was saved may have a new head, or pooler: a module
    is new if the checkpoint has none like it in any layer.

    :param renamed: the model's name of each tensor in the files
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
    saved_as = getattr(model.config, "architectures", None) or ()
    is_same_class = type(model).__name__ in saved_as
    kinds_found = {_without_numbers(name) for name in found}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for module_name, module in model.named_modules():
        weight = f"{module_name}.weight"
        if (
            isinstance(module, nn.Linear)
            and isinstance(getattr(module, "weight", None), torch.Tensor)
            and sparsity.promises(module_name)
            and weight not in found | tied
            and files
            and (is_same_class or _without_numbers(weight) in kinds_found)
        ):
            raise ValueError(_missing(module_name))


def _without_numbers(name: str) -> str:
    """Replaces the numbers of layers and experts in a tensor's name."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _missing(module: str) -> str:
    return (
        f"the checkpoint has no weight for {module}, which its sparsity_config says is "
        "sparse. It is damaged, or cut short."
    )
