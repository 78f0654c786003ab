# SPDX-License-Identifier: Apache-2.0
"""Have transformers turn stored sparse weights into dense ones while it loads them."""

from __future__ import annotations

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
_WEIGHT = ".weight"


def sparse_conversions(stock: Iterable[WeightTransform]) -> list[WeightConverter]:
    """
    Makes the conversions that read sparse weights; they go before transformers' own.

    Where those merge weights into one (the experts of a layer, say), the same is done
    with sparse ones, once they are dense.

    :param stock: transformers' own conversions
    """
    merging = [
        conversion
        for conversion in stock
        if isinstance(conversion, WeightConverter)
        and len(conversion.target_patterns) == 1
        and all(source.endswith(_WEIGHT) for source in conversion.source_patterns)
    ]
    plain = WeightConverter(
        source_patterns=_stored(""),
        target_patterns=_WEIGHT,
        operations=[Decompress(), Fit()],
    )
    return [*map(_after_decompressing, merging), plain]


def without_sparse(used: Iterable[WeightTransform]) -> list[WeightTransform]:
    """Returns the conversions that a dense checkpoint would have used, for saving."""
    kept: dict[int, WeightTransform] = {}
    for conversion in used:
        first = next(iter(getattr(conversion, "operations", ())), None)
        stock = first.instead_of if isinstance(first, Decompress) else conversion
        if stock is not None:
            kept[id(stock)] = stock
    return list(kept.values())


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
        full_layer_name: str,
        **kwargs: object,
    ) -> dict[str, list[Tensor]]:
        """Returns weights by the pattern of their values, whose order is kept."""
        stored: dict[str, dict[str, Sequence[Tensor]]] = defaultdict(dict)
        for pattern in list(input_dict):
            source, _, part = pattern.removesuffix("$").rpartition("\\.")
            stored[source][part] = input_dict.pop(pattern)
        return {
            _stored(source)[0]: _decompress(parts, full_layer_name)
            for source, parts in stored.items()
        }


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


def _after_decompressing(conversion: WeightConverter) -> WeightConverter:
    sources = [
        source.removesuffix(_WEIGHT).removesuffix("\\")  # of an escaped dot
        for source in conversion.source_patterns
    ]
    made = WeightConverter(
        source_patterns=[pattern for source in sources for pattern in _stored(source)],
        target_patterns=list(conversion.target_patterns),
        operations=[Decompress(conversion), *conversion.operations, Fit()],
    )
    made.scope_prefix = conversion.scope_prefix
    made.base_model_prefix = conversion.base_model_prefix
    return made


def _stored(source: str) -> list[str]:
    """Makes the patterns of the tensors that store a module's weight."""
    return [f"{source}\\.{part}$" for part in _PARTS]


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
