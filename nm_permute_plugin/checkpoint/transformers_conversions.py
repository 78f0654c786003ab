# SPDX-License-Identifier: Apache-2.0
"""Have transformers turn stored sparse weights into dense ones while it loads them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightTransform,
)

from nm_permute_plugin.checkpoint.bitmask import decompress_any
from nm_permute_plugin.checkpoint.codec import decompress
from nm_permute_plugin.checkpoint.directory import PARTS

_PARTS = PARTS["sparse-bitmask"]
_WEIGHT = re.compile(r"(?<!\w)weight\$?$")
"""Finds a pattern of transformers that means weights, e.g. ``experts.*.up.weight``."""
_STORED = re.compile(rf"\(\?<!\\w\)({'|'.join(_PARTS)})\$$")
"""Finds a pattern that ``_stored`` made of such a one."""
_SCOPE = ("scope_prefix", "base_model_prefix", "force_cpu")


def with_sparse(stock: Iterable[WeightTransform]) -> list[WeightTransform]:
    """
    Makes conversions that read sparse weights wherever transformers' own read dense ones.

    What those do with weights (merge the experts of a layer, multiply by scales) is done
    with sparse ones as well, once they are dense.

    :param stock: transformers' own conversions, those of its quantizer among them
    """
    plain = WeightConverter(
        source_patterns=_stored(r"\.weight"),
        target_patterns=".weight",
        operations=[Decompress(), Fit()],
    )
    # of the conversions only the first to match is used
    return [*map(_reading_sparse, stock), plain]


def without_sparse(used: Iterable[WeightTransform]) -> list[WeightTransform]:
    """Returns the conversions that a dense checkpoint would have used, for saving."""
    kept = []
    for conversion in used:
        first = next(iter(getattr(conversion, "operations", ())), None)
        stock = first.instead_of if isinstance(first, Decompress) else conversion
        if stock is not None:
            kept.append(stock)
    return kept


class Decompress(ConversionOps):
    """
    Turns the stored tensors of modules into their dense weights.

    :param instead_of: the conversion that does the same for dense checkpoints
    """

    def __init__(self, instead_of: WeightConverter | None = None) -> None:
        self.instead_of = instead_of

    def convert(
        self,
        input_dict: dict[str, Sequence[Tensor]],
        *,
        source_patterns: Sequence[str],
        full_layer_name: str,
        **kwargs: object,
    ) -> dict[str, Sequence[Tensor]]:
        """Returns weights, and whatever else was read, by transformers' patterns."""
        stored: dict[str, dict[str, Sequence[Tensor]]] = defaultdict(dict)
        for pattern in list(input_dict):
            if found := _STORED.search(pattern):
                stored[pattern[: found.start()]][found[1]] = input_dict.pop(pattern)
        weights = {_WEIGHT.sub("", source): source for source in source_patterns}
        return {
            weights.get(module, full_layer_name): _decompress(parts, full_layer_name)
            for module, parts in stored.items()
        } | input_dict


class Fit(ConversionOps):
    """Casts a dense tensor to the model's dtype, once its shape is the model's."""

    def convert(
        self,
        input_dict: Mapping[str, Tensor | Sequence[Tensor]],
        *,
        full_layer_name: str,
        model: nn.Module,
        **kwargs: object,
    ) -> dict[str, Tensor]:
        (found,) = input_dict.values()
        tensor = found if isinstance(found, Tensor) else found[0]
        owner, _, leaf = full_layer_name.rpartition(".")
        target: Tensor = getattr(model.get_submodule(owner), leaf)
        return {full_layer_name: _fitted(tensor, target, full_layer_name)}


def _reading_sparse(conversion: WeightTransform) -> WeightTransform:
    if (
        not isinstance(conversion, WeightConverter)
        or len(conversion.target_patterns) > 1
        or not any(map(_WEIGHT.search, conversion.source_patterns))
    ):
        return conversion
    sources = conversion.source_patterns
    weights = [source for source in sources if _WEIGHT.search(source)]
    made = WeightConverter(
        source_patterns=[*sources, *(one for w in weights for one in _stored(w))],
        target_patterns=list(conversion.target_patterns),
        operations=[Decompress(conversion), *conversion.operations, Fit()],
    )
    for name in _SCOPE:
        if hasattr(conversion, name):
            setattr(made, name, getattr(conversion, name))
    return made


def _stored(weight: str) -> list[str]:
    """Makes the patterns of the tensors that store a module's weight."""
    return [_WEIGHT.sub(rf"(?<!\\w){part}$", weight) for part in _PARTS]


def _decompress(parts: Mapping[str, Sequence[Tensor]], name: str) -> list[Tensor]:
    """Makes the dense weights of modules whose parts stand in the same order."""
    missing = {"compressed", "bitmask", "shape"} - set(parts)
    if missing:
        raise ValueError(f"{name}: the checkpoint has no {', '.join(sorted(missing))}")
    decode = decompress_any if "row_offsets" in parts else decompress
    return [
        decode(**dict(zip(parts, one, strict=True)), name=name)
        for one in zip(*parts.values(), strict=True)
    ]


def _fitted(weight: Tensor, target: Tensor, name: str) -> Tensor:
    if weight.shape != target.shape:
        raise ValueError(
            f"{name} is {tuple(weight.shape)} in the checkpoint, and "
            f"{tuple(target.shape)} in the model that config.json describes"
        )
    if weight.dtype == target.dtype:
        return weight
    if 1 in (weight.dtype.itemsize, target.dtype.itemsize):
        raise ValueError(
            f"{name} is {weight.dtype} in the checkpoint, {target.dtype} in the model. "
            "Its quantization_config does not belong to these weights."
        )
    return weight.to(target.dtype)
