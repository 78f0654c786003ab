# SPDX-License-Identifier: Apache-2.0
"""``nm-permute fields``: the fields of a recipe, what they take, their defaults."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from nm_permute_plugin.cli.common import print_table

if TYPE_CHECKING:
    from pydantic import BaseModel

BEGIN = "<!-- nm-permute fields: begin; written by `nm-permute fields --into FILE` -->"
END = "<!-- nm-permute fields: end -->"


def fields(
    name: Annotated[
        str | None,
        Argument(help="A group or a field, learn or learn.steps; all if left out."),
    ] = None,
    into: Annotated[
        Path | None,
        Option(
            help="Write the table between its markers in this Markdown file instead.",
            hidden=True,
        ),
    ] = None,
) -> None:
    """Print a table of the fields of a recipe: what they take, defaults, what they do."""
    table = fields_table(name)
    if into is None:
        print_table(table)
        return
    write_between_markers(into, table)
    typer.echo(f"{into}: the table of fields is up to date")


@dataclass(frozen=True)
class FieldRow:
    """
    One field of a recipe.

    :param path: ``learn.steps``, say
    :param takes: the values that it takes, in words
    :param default: as a recipe would write it; empty for a group
    :param meaning: what the docstring of its class says
    """

    path: str
    takes: str
    default: str
    meaning: str


def fields_table(name: str | None = None) -> str:
    """
    Write fields in a Markdown table.

    :param name: a group, whose fields are written as well, or a field, by its path or its
        last word; None for all
    :raises ValueError: if there is no such field
    """
    rows = list(field_rows())
    if name is not None:
        paths = [row.path for row in rows]
        named = [path for path in paths if name in (path, path.rpartition(".")[2])]
        if not named:
            from nm_permute_plugin._near_names import did_you_mean

            words = {path.rpartition(".")[2] for path in paths}
            near = did_you_mean(name, [*paths, *sorted(words)])
            raise ValueError(
                f"there is no field {name}{near or '; leave the name out for all fields'}"
            )
        rows = [
            row
            for row in rows
            if any(f"{row.path}.".startswith(f"{path}.") for path in named)
        ]
    lines = ["| field | takes | default | what it does |", "|---|---|---|---|"]
    for row in rows:
        default = f"`{row.default}`" if row.default else ""
        lines.append(f"| `{row.path}` | {row.takes} | {default} | {row.meaning} |")
    return "\n".join(lines)


def field_rows() -> Iterator[FieldRow]:
    """Yield every field of ``Settings``, a group before its fields."""
    from nm_permute_plugin.pruning.settings import Settings

    schema = Settings.model_json_schema()
    yield from _rows(Settings, schema, schema["$defs"], "")


def write_between_markers(file: Path, table: str) -> None:
    """
    Replace what stands between the markers of a Markdown file.

    :raises ValueError: if the file has no markers
    """
    text = file.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{file} must hold these two lines once: {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    file.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def _rows(
    of: "type[BaseModel]", schema: dict[str, Any], groups: dict[str, Any], prefix: str
) -> Iterator[FieldRow]:
    import yaml

    meanings = _meanings(of)
    for name, field in of.model_fields.items():
        path, inner = f"{prefix}{name}", schema["properties"][name]
        if "$ref" in inner:
            yield FieldRow(path, "fields of its own", "", meanings[name])
            group = groups[inner["$ref"].rpartition("/")[2]]
            yield from _rows(field.annotation, group, groups, f"{path}.")  # type: ignore[arg-type]
        else:
            # In a list, so that YAML puts no mark of a document's end behind a word.
            default = yaml.safe_dump([inner["default"]], default_flow_style=True)
            yield FieldRow(path, _takes(inner), default.strip()[1:-1], meanings[name])


def _takes(schema: dict[str, Any]) -> str:
    """Say in words what a JSON schema takes."""
    if "anyOf" in schema:
        return " or ".join(_takes(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(schema["enum"])
    kind = schema["type"]
    if "prefixItems" in schema:
        return (
            f"list of {len(schema['prefixItems'])}: {_takes(schema['prefixItems'][0])}"
        )
    if kind == "array":
        return f"list of {_takes(schema['items'])}"
    words = {
        "boolean": "true, false",
        "string": "text",
        "object": "mapping",
    }
    bounds = {
        "minimum": ">=",
        "exclusiveMinimum": ">",
        "maximum": "<=",
        "exclusiveMaximum": "<",
    }
    said = [
        f"{word} {schema[name]:g}" for name, word in bounds.items() if name in schema
    ]
    return " ".join([words.get(kind, kind), *said])


def _meanings(of: "type[BaseModel]") -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of their parameters."""
    found: dict[str, str] = {}
    for base in reversed(of.__mro__):
        if not base.__module__.startswith(__name__.partition(".")[0]):
            continue
        parts = re.split(r"^\s*:param (\w+): ", base.__doc__ or "", flags=re.M)[1:]
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            said = " ".join(text.split()).replace("``", "`").replace("|", r"\|")
            found[name] = said
    return found
