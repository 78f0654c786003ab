# SPDX-License-Identifier: Apache-2.0
"""The table of fields says what the settings say, wherever it is written."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import assert_one_error, nm_permute
from pydantic import BaseModel

from nm_permute_plugin.cli.fields import (
    BEGIN,
    END,
    field_rows,
    fields_table,
    write_between_markers,
)
from nm_permute_plugin.pruning.settings import Settings

README = Path(__file__).parents[2] / "recipes" / "README.md"


def written(of: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Every setting by its path, as a recipe would hold it; None for a group."""
    found: dict[str, Any] = {}
    for name, value in of.model_dump().items():
        inner = getattr(of, name)
        if isinstance(inner, BaseModel):
            found |= {f"{prefix}{name}": None} | written(inner, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def test_every_setting_has_its_row_and_its_default() -> None:
    rows = {row.path: row for row in field_rows()}
    settings = written(Settings())
    settings["learn.published.temperature"] = list(
        Settings().learn.published.temperature
    )
    assert list(rows) == list(settings)
    groups = {path for path in rows if any(p.startswith(f"{path}.") for p in rows)}
    assert {path for path, row in rows.items() if not row.default} == groups
    assert {
        path: yaml.safe_load(rows[path].default) for path in rows if path not in groups
    } == {path: value for path, value in settings.items() if path not in groups}


def test_every_row_says_what_the_field_takes_and_does() -> None:
    assert [row.path for row in field_rows() if not (row.takes and row.meaning)] == []
    takes = {row.path: row.takes for row in field_rows()}
    assert takes["method"] == "learned, search, identity"
    assert takes["learn.swaps.share"] == "number > 0 <= 1"
    assert takes["validation.share"] == "number > 0 < 1"
    assert takes["memory.gradient_checkpointing"] == "true, false or null"
    assert takes["spaces"] == "list of residual, hidden, value"


def test_the_readme_of_the_recipes_holds_the_table_of_today() -> None:
    # nm-permute fields --into recipes/README.md
    text = README.read_text()
    assert text.split(BEGIN)[1].split(END)[0] == f"\n{fields_table()}\n"


def test_the_command_prints_the_table() -> None:
    result = nm_permute("fields")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{fields_table()}\n"


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        (
            "memory",
            [
                "memory",
                "memory.micro_batch_size",
                "memory.gradient_checkpointing",
                "memory.shard",
            ],
        ),
        ("score", ["score"]),
        ("steps", ["learn.steps", "recover.end_to_end.steps"]),
        ("learn.steps", ["learn.steps"]),
    ],
)
def test_a_name_chooses_a_part_of_the_table(name: str, paths: list[str]) -> None:
    lines = nm_permute("fields", name).stdout.splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == paths


def test_an_unknown_field_is_told_the_near_ones() -> None:
    assert_one_error(
        nm_permute("fields", "micro_batch"), "did you mean .*micro_batch_size"
    )
    assert_one_error(nm_permute("fields", "xyz"), "leave the name out for all fields")


def test_a_table_is_written_between_its_markers(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert nm_permute("fields", "score", "--into", file).exit_code == 0
    table = fields_table("score")
    assert file.read_text() == f"before\n{BEGIN}\n{table}\n{END}\nafter\n"
    file.write_text("no markers")
    with pytest.raises(ValueError, match="must hold these two lines"):
        write_between_markers(file, table)
