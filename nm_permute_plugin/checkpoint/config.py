# SPDX-License-Identifier: Apache-2.0
"""Read and write the ``sparsity_config`` block of a checkpoint's ``config.json``."""

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nm_permute_plugin.maths.pattern import NMPattern

if TYPE_CHECKING:
    import regex

QUANT_METHOD = "compressed-tensors"
LAYOUT_VERSION = "0.14.0"
"""Names the compressed-tensors version whose layout we write; readers compare it."""

SparseFormat = Literal["sparse-24-bitmask", "sparse-bitmask"]
Format = Literal["dense", "sparse-24-bitmask", "sparse-bitmask"]
AskedFormat = Literal["auto", "dense", "sparse-24-bitmask", "sparse-bitmask"]
"""Lists what a recipe may ask for; "auto" leaves the choice to ``choose_format``."""
Json = dict[str, object]

_HOLDERS = ("quantization_config", "compression_config")
_BLOCK = "sparsity_config"
_PATTERN = "re:"
_SECONDS = 1.0  # for one name: a sound expression takes microseconds
_NO_QUANTIZATION = {"quant_method", "version", _BLOCK, "transform_config"}


class SparsityConfig(BaseModel):
    """
    Says what is sparse in a checkpoint, and how it is stored.

    :param format: how the sparse weights are stored
    :param sparsity_structure: ``"2:4"``, or another N:M of ``sparse-bitmask``
    :param global_sparsity: the share of zeros in the whole model, 0 to 1
    :param targets: module names, class names (``Linear``) or ``re:`` patterns that are
        sparse; None for every one
    :param ignore: those that are dense all the same
    :param registry_requires_subclass: a leftover that the format's first readers write

    >>> SparsityConfig(targets=("Linear",), ignore=("lm_head",)).sparsity_structure
    '2:4'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Format = "sparse-24-bitmask"
    sparsity_structure: str = "2:4"
    global_sparsity: float = Field(default=0.0, ge=0.0, le=1.0)
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    registry_requires_subclass: bool = False

    @field_validator("ignore", mode="before")
    @classmethod
    def _none_is_empty(cls, value: object) -> object:
        return () if value is None else value

    @field_validator("targets", "ignore")
    @classmethod
    def _read_expressions(cls, value: tuple[str, ...] | None) -> object:
        for entry in value or ():
            if entry.startswith(_PATTERN):
                _expression(entry)
        return value

    @field_validator("sparsity_structure", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return "unstructured" if value is None else str(value).lower()

    @property
    def pattern(self) -> NMPattern | None:
        """Returns the N:M pattern, or None where no pattern is promised."""
        if self.sparsity_structure in ("unstructured", "0:0"):
            return None
        return NMPattern.parse(self.sparsity_structure)

    def promises(self, module: str, kind: str = "Linear") -> bool:
        """
        Tells whether the block says that a module is sparse.

        :param module: its name
        :param kind: its class

        >>> config = SparsityConfig(targets=("Linear",), ignore=("lm_head",))
        >>> config.promises("model.layers.0.mlp.up_proj"), config.promises("lm_head")
        (True, False)
        """
        if _any_matches(self.ignore, module, kind):
            return False
        return self.targets is None or _any_matches(self.targets, module, kind)

    def to_json(self) -> Json:
        """Returns the block as it stands in ``config.json``."""
        return self.model_dump(mode="json")


def matches(entry: str, module: str, kind: str = "Linear") -> bool:
    """
    Tells whether an entry of a list of targets means a module.

    :param entry: a module's name, a class name, or ``re:`` and an expression that
        matches the beginning of a name
    :param kind: the class name of the module
    :raises ValueError: for an expression that is none, or that takes seconds

    >>> [matches(entry, "mlp.up_proj") for entry in ("Linear", "re:.*up_", "up_proj")]
    [True, True, False]
    """
    if not entry.startswith(_PATTERN):
        return entry in (module, kind)
    try:
        found = _expression(entry).match(module, timeout=_SECONDS)
    except TimeoutError as error:
        raise ValueError(
            f"the pattern {entry!r} is still not compared with {module!r} after "
            f"{_SECONDS:.0f} second: write it without repeats inside of repeats"
        ) from error
    return found is not None


def _any_matches(entries: tuple[str, ...], module: str, kind: str) -> bool:
    """Tells whether one of a list of targets means a module."""
    names, patterns = _divided(entries)
    if not names.isdisjoint((module, kind)):
        return True
    return any(matches(entry, module, kind) for entry in patterns)


@lru_cache(maxsize=16)
def _divided(entries: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Divides targets into names and patterns: a mixture's list names every expert."""
    patterns = tuple(entry for entry in entries if entry.startswith(_PATTERN))
    return frozenset(entries).difference(patterns), patterns


@cache
def _expression(entry: str) -> "regex.Pattern[str]":
    """Reads an entry that begins with ``re:``."""
    import regex  # which can be stopped: `re` may take for ever

    try:
        return regex.compile(entry.removeprefix(_PATTERN))
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{entry!r} is no regular expression: {error}") from error


def read_sparsity_config(config: Mapping[str, object]) -> SparsityConfig | None:
    """
    Reads the block of a whole ``config.json``, or of the quantization config in it.

    :return: None where there is none, or an empty one
    :raises ValueError: if the block is not understood, naming its field

    >>> read_sparsity_config({"model_type": "llama"}) is None
    True
    """
    holder = quantization_config(config)
    block = (config if holder is None else holder).get(_BLOCK)
    if not block:
        return None
    try:
        return SparsityConfig.model_validate(block)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"config.json: {_BLOCK}.{field} is {first['input']!r}: {first['msg']}. The "
            "checkpoint is of another format, or a newer one."
        ) from error


def quantization_config(config: Mapping[str, object]) -> Mapping[str, object] | None:
    """Finds the quantization config of a ``config.json``, by its new or old name."""
    for name in _HOLDERS:
        holder = config.get(name)
        if isinstance(holder, Mapping):
            return holder
    return None


def has_old_name(config: Mapping[str, object]) -> bool:
    """Tells whether the quantization config has a name that transformers passes over."""
    new, old = (isinstance(config.get(name), Mapping) for name in _HOLDERS)
    return old and not new


def weight_schemes(config: Mapping[str, object]) -> list[Mapping[str, object]]:
    """
    Lists how weights are quantized, one entry for each group of modules.

    >>> groups = {"group_0": {"weights": {"num_bits": 8}}, "group_1": {"weights": None}}
    >>> weight_schemes({"quantization_config": {"config_groups": groups}})
    [{'num_bits': 8}]
    """
    groups = (quantization_config(config) or {}).get("config_groups")
    found = [
        group.get("weights")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping)
    ]
    return [weights for weights in found if isinstance(weights, Mapping)]


def quantization_format(config: Mapping[str, object]) -> str | None:
    """
    Tells how quantized weights are stored, e.g. ``"float-quantized"``; None without any.

    >>> quantization_format({"quantization_config": {"sparsity_config": {}}}) is None
    True
    """
    holder = quantization_config(config)
    if holder is None or not set(holder) - _NO_QUANTIZATION:
        return None
    return str(holder.get("format", holder.get("quant_method", "unknown")))


def with_sparsity_config(
    config: Mapping[str, object], sparsity: SparsityConfig | None
) -> Json:
    """
    Returns a ``config.json`` with another block, or without; keeps the quantization.

    :param sparsity: None takes the block out, and with it a quantization config that
        held nothing else

    >>> config = with_sparsity_config({}, SparsityConfig())
    >>> with_sparsity_config(config, None)
    {}
    """
    holder = dict(quantization_config(config) or {})
    new = {name: value for name, value in config.items() if name not in _HOLDERS}
    quantized = quantization_format(config) is not None
    if sparsity is not None:
        fresh = {"quant_method": QUANT_METHOD, "version": LAYOUT_VERSION}
        block: Json = {**(holder or fresh), _BLOCK: sparsity.to_json()}
    elif quantized:
        block = {**holder, _BLOCK: {}} if _BLOCK in holder else holder
    else:
        return new
    return {**new, "quantization_config": block}
