# SPDX-License-Identifier: Apache-2.0
"""The settings of a run, and the text it calibrates on, as a config of optimum."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
from optimum.configuration_utils import BaseConfig
from optimum.version import __version__ as optimum_version
from pydantic import BeforeValidator, Field, ValidationError

from nm_permute_plugin.pruning.settings import Frozen, Settings
from nm_permute_plugin.pruning.settings.errors import one_line

_COLUMNS = ("input_ids", "attention_mask", "position_ids", "loss_mask")
"""What of a tokenised sample is read; ``read_samples`` says how."""

_WRITTEN = ("optimum_version", "transformers_version")
"""What a config's file says beside its fields."""


def _samples(value: Any) -> Any:
    """Lists of numbers for tokenised samples, so that a config can be written as JSON."""
    if value is None or isinstance(value, str):
        return value
    wanted = (
        "a list of texts, or of tokenised samples with input_ids, or a data set's name"
    )
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"must be {wanted}; got {_shown(value)}")
    samples = list(value)
    if not samples:
        raise ValueError(f"is empty: give {wanted}")
    if all(isinstance(sample, str) for sample in samples):
        return samples
    for number, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or "input_ids" not in sample:
            raise ValueError(f"must be {wanted}; sample {number} is {_shown(sample)}")
    return [row for i, sample in enumerate(samples) for row in _rows(sample, i)]


def _rows(sample: Mapping[str, Any], number: int) -> list[dict[str, list[int]]]:
    """The rows of a tokenised sample, which holds one row or several."""
    try:
        columns = {k: torch.as_tensor(sample[k]) for k in _COLUMNS if k in sample}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"sample {number} holds no numbers: {error}") from error
    ids = columns["input_ids"]
    for name, values in columns.items():
        if (
            values.is_floating_point()
            or values.shape != ids.shape
            or ids.dim() not in (1, 2)
        ):
            raise ValueError(
                f"sample {number} holds {name} of shape {list(values.shape)} and "
                f"{values.dtype}; give whole numbers, one for each of the input_ids, "
                "which are [tokens] or [rows, tokens]"
            )
    rows = {
        k: values.reshape(-1, ids.shape[-1]).tolist() for k, values in columns.items()
    }
    return [
        dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)
    ]


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(str, value)) or 'nothing'}"
    return repr(value) if isinstance(value, str | int) else f"a {type(value).__name__}"


class _Calibration(Frozen):
    dataset: Annotated[Any, BeforeValidator(_samples)] = None
    rows: int = Field(default=512, ge=2)
    sequence_length: int | None = Field(default=None, ge=2)


class NMConfig(BaseConfig):
    """
    Everything that can be said of a run, as ``nm_config.json`` holds it.

    >>> config = NMConfig(mask_structure="4:8", method="search", search={"rounds": 3})
    >>> config.settings.search.rounds
    3
    >>> NMConfig(scor="ria")
    Traceback (most recent call last):
    ValueError: scor: there is no such field; did you mean score?

    :param dataset: texts, or tokenised samples (``[{"input_ids": [1, 100, 15]}]``), or the
        name of a data set: a file, a folder, or ``ORGANISATION/NAME[:CONFIG][@SPLIT]`` on
        the Hugging Face hub
    :param rows: rows of calibration text at most, by default 512
    :param sequence_length: tokens of a row of texts; by default 1024, or as many as the
        model has positions. Tokenised samples stay as they are
    :param fields: these three, and the fields of ``nm_permute_plugin.Settings``, of which
        a group is a mapping: ``learn={"steps": 100}``
    :raises ValueError: for a field that there is not, or a value that makes no sense
    """

    CONFIG_NAME = "nm_config.json"
    FULL_CONFIGURATION_FILE = "nm_config.json"

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        for name, value in _validated(fields).items():
            setattr(self, name, value)

    @property
    def settings(self) -> Settings:
        """What a run takes; the fields as they are now."""
        return Settings(**{name: getattr(self, name) for name in Settings.model_fields})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and the version of optimum that they were written with."""
        names = [*_Calibration.model_fields, *Settings.model_fields]
        fields = {name: getattr(self, name) for name in names}
        return fields | {"optimum_version": optimum_version}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """
        Make a config of the fields that ``to_dict`` gives.

        :param kwargs: fields to take instead of those in ``config_dict``
        :raises ValueError: as the class
        """
        with_unused = kwargs.pop("return_unused_kwargs", False)
        names = {*_Calibration.model_fields, *Settings.model_fields}
        instead = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        fields = {k: v for k, v in config_dict.items() if k not in _WRITTEN}
        config = cls(**fields | instead)
        return (config, kwargs) if with_unused else config

    def __eq__(self, other: object) -> bool:
        # The host compares the fields of its own that every config has, and no others.
        return isinstance(other, NMConfig) and self.to_dict() == other.to_dict()


def _validated(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields with their values, defaults too."""
    text = {k: fields[k] for k in fields if k in _Calibration.model_fields}
    others = {k: fields[k] for k in fields if k not in text}
    try:
        calibration = _Calibration.model_validate(text)
        settings = Settings.model_validate(others)
    except ValidationError as error:
        raise ValueError(one_line(error)) from None
    return calibration.model_dump() | settings.model_dump()
