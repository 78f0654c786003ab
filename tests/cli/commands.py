# SPDX-License-Identifier: Apache-2.0
"""The command ``nm-permute`` run in this process, and what it left."""

import re
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from nm_permute_plugin.cli.app import app


def nm_permute(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def prune(tmp_path: Path, *more: object, out: Path | None = None) -> Result:
    """``prune`` of the model, the recipe and the text in ``tmp_path``."""
    paths = [tmp_path / "dense", tmp_path / "recipe.yaml", out or tmp_path / "out"]
    length = ["--sequence-length", 32, "--device", "cpu"]
    return nm_permute("prune", *paths, *length, *more)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_one_error(result: Result, message: str) -> None:
    """The command failed with one line of ``error: ...``, not with a traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    # Progress bars end in carriage returns.
    errors = re.findall(r"(?:^|[\r\n]) *(error: [^\r\n]*)", result.stderr)
    assert len(errors) == 1, result.stderr
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in result.output
