# SPDX-License-Identifier: Apache-2.0
"""The types of settings that a recipe may write in more than one way."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs.spec_file import read_spec


def _listed(value: object) -> object:
    """A single word where a list is meant is a list of one."""
    return (value,) if isinstance(value, str) else value


def _in_quotes(value: object) -> object:
    """Tell that YAML reads 2:4 without quotes as hours and minutes: the number 124."""
    if isinstance(value, int) and not isinstance(value, bool):
        n, m = divmod(value, 60)
        wanted = f"{n}:{m}" if 0 < n < m else "2:4"
        raise ValueError(
            f'write it in quotes, mask_structure: "{wanted}"; without them YAML reads the '
            f"number {value}"
        )
    return value


def _parsed(value: str) -> str:
    """Refuse what is no pattern by itself, before any other field is compared with it."""
    return str(NMPattern.parse(value))


def _read_file(value: object) -> object:
    """A path stands for the lines of the YAML file that it names."""
    return read_spec(Path(value)) if isinstance(value, str | Path) else value


def _readable(names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a pattern that is no regular expression."""
    for name in names:
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            raise ValueError(
                f"{name!r} is no regular expression: {error}; write a backslash before a "
                "sign that stands for itself"
            ) from error
    return names


# Recipes are YAML, which knows lists and no tuples.
LIST = (BeforeValidator(_listed), PlainSerializer(list))
Names = Annotated[tuple[str, ...], *LIST, AfterValidator(_readable)]

PatternText = Annotated[str, BeforeValidator(_in_quotes), AfterValidator(_parsed)]
SpecLines = Annotated[dict[str, str] | None, BeforeValidator(_read_file)]
