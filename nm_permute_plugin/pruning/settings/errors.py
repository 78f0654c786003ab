# SPDX-License-Identifier: Apache-2.0
"""Have pydantic's errors say what was got, what is taken, and what to write instead."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from nm_permute_plugin._near_names import did_you_mean

WANTED = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text, in quotes",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "too_short": "must name at least one",
}
"""What is said instead of pydantic's words, by the type of its error."""


def with_remedies(
    error: ValidationError, of: type[BaseModel], names: Sequence[str] | None = None
) -> ValidationError:
    """
    Return the same error with messages that lead to the remedy.

    Errors of a group inside of ``of`` stay as they are: the group has mended them.

    :param of: the model that was validated
    :param names: the fields that a person may write; by default all of ``of``
    """
    fields = list(of.model_fields) if names is None else list(names)
    mended = [
        InitErrorDetails(
            type=PydanticCustomError(found["type"], _message(found, of, fields)),
            loc=found["loc"],
            input=found["input"],
        )
        for found in _one_each(error.errors(include_url=False), of)
    ]
    return ValidationError.from_exception_data(error.title, mended, hide_input=True)


def one_line(error: ValidationError) -> str:
    """Return all messages of an error in one line, each behind the field's path."""
    lines = []
    for found in error.errors(include_url=False):
        path = ".".join(map(str, found["loc"]))
        message = found["msg"].removeprefix("Value error, ")
        lines.append(message if message.startswith(path) else f"{path}: {message}")
    return "; ".join(lines)


def _one_each(found: list[ErrorDetails], of: type[BaseModel]) -> list[ErrorDetails]:
    """Leave one error of each field: a union has one for every kind that it takes."""
    best: dict[object, ErrorDetails] = {}
    kept = []
    for error in found:
        first = error["loc"][0] if error["loc"] else None
        if first is None or _group(of, first) is not None:
            kept.append(error)
        elif first not in best or len(error["loc"]) > len(best[first]["loc"]):
            best[first] = error
    # What pydantic calls the kinds of a union is no part of a path that a person wrote.
    for error in best.values():
        error["loc"] = tuple(part for part in error["loc"] if not _is_kind(part))
    return kept + list(best.values())


def _is_kind(part: int | str) -> bool:
    return str(part).startswith(("constrained-", "tuple["))


def _group(of: type[BaseModel], name: object) -> type[BaseModel] | None:
    """Return the class of a field that is a group of settings."""
    field = of.model_fields.get(str(name))
    kind = None if field is None else field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _deeper(of: type[BaseModel], name: str) -> str:
    """Ask for the fields of this name inside of groups, where there are some."""
    paths = [path for path in _paths(of) if path.endswith(f".{name}")][:3]
    return f"; did you mean {' or '.join(paths)}?" if paths else ""


def _paths(of: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name in of.model_fields:
        yield f"{prefix}{name}"
        group = _group(of, name)
        if group is not None:
            yield from _paths(group, f"{prefix}{name}.")


def _message(error: ErrorDetails, of: type[BaseModel], fields: list[str]) -> str:
    kind, got = error["type"], _shown(error["input"])
    first = error["loc"][0] if error["loc"] else None
    context: dict[str, Any] = error.get("ctx", {})
    group = None if first is None else _group(of, first)
    if group is not None and len(error["loc"]) > 1:
        return error["msg"]
    if group is not None and kind == "model_type":
        inner = list(group.model_fields)
        return (
            f"is a group of fields, got {got}: write {first}: {{{inner[0]}: ...}}; "
            f"its fields are {', '.join(inner)}"
        )
    if kind == "extra_forbidden":
        near = did_you_mean(str(first), fields) or _deeper(of, str(first))
        return f"there is no such field{near or '; there are ' + ', '.join(fields)}"
    if kind == "literal_error":
        taken = str(context["expected"])
        near = did_you_mean(str(error["input"]), re.findall(r"'([^']*)'", taken))
        return f"must be {taken}, got {got}{near}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "is missing"
    if kind in WANTED:
        return f"{WANTED[kind]}, got {got}"
    said = error["msg"].replace("Input should be", "must be")
    return said if said == error["msg"] else f"{said}, got {got}"


def _shown(value: object) -> str:
    """Write a value as YAML does where that is no word of Python."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)
