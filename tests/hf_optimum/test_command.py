# SPDX-License-Identifier: Apache-2.0
"""``optimum-cli nm-permute`` is the command ``nm-permute``, found by optimum itself."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from optimum.commands.base import RootOptimumCLICommand
from optimum.commands.optimum_cli import register_optimum_cli_subcommand

from nm_permute_plugin.cli.app import app
from nm_permute_plugin.optimum.register_nm_permute import REGISTER_COMMANDS

ROOT = Path(__file__).parents[2]
REGISTER = "optimum/commands/register/register_nm_permute.py"
COMMANDS = [
    command.name or command.callback.__name__ for command in app.registered_commands
]
HEAVY = ["torch", "transformers", "llmcompressor", "scipy"]


def optimum_cli(*words: object) -> int:
    """What ``optimum-cli`` does with words; its exit status."""
    root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
    for command in REGISTER_COMMANDS:
        register_optimum_cli_subcommand(command, parent_command=root)
    args = root.parser.parse_args([str(word) for word in words])
    with pytest.raises(SystemExit) as ended:
        args.func(args).run()
    return int(ended.value.code or 0)


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which the wheel's files are installed."""
    places = [str(ROOT)]
    try:
        found = importlib.util.find_spec(
            "optimum.commands.register.register_nm_permute"
        )
    except ModuleNotFoundError:
        found = None
    if found is None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
        for source, target in wheel["force-include"].items():
            (tmp_path / target).parent.mkdir(parents=True)
            shutil.copy(ROOT / source, tmp_path / target)
        places.append(str(tmp_path))
    return os.environ | {"PYTHONPATH": os.pathsep.join(places)}


def test_optimum_finds_the_command_and_imports_nothing_heavy(
    installed: dict[str, str],
) -> None:
    code = (
        "import json, sys\nfrom optimum.commands.optimum_cli import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n"
        f"    print(json.dumps([ended.code, [x for x in {HEAVY} if x in sys.modules]]))"
    )
    words = ["nm-permute", "prune", "--help"]
    run = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Usage: optimum-cli nm-permute prune [OPTIONS] {MODEL}" in run.stdout
    assert json.loads(run.stdout.splitlines()[-1]) == [0, []], run.stderr


def test_the_wheel_puts_the_file_where_optimum_looks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert list(wheel["force-include"].values()) == [REGISTER]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_own_help(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = command.replace("_", "-")
    assert optimum_cli("nm-permute", name, "--help") == 0
    assert f"Usage: optimum-cli nm-permute {name} " in capsys.readouterr().out


def test_the_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert optimum_cli("nm-permute", "--help") == 0
    shown = capsys.readouterr().out
    names = [command.replace("_", "-") for command in COMMANDS]
    assert [name for name in names if not re.search(rf"^│ {name} ", shown, re.M)] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune", "--misspelt", "x"], "No such option: --misspelt"),
        (["--misspelt"], "No such option: --misspelt"),
        (["misspelt"], "No such command 'misspelt'"),
    ],
    ids=["option of a command", "option", "command"],
)
def test_a_word_that_is_unknown_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert optimum_cli("nm-permute", *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count(said) == 1


def test_what_was_done_wrong_is_one_line_of_error(
    tiny_checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, none = tiny_checkpoint(), tmp_path / "none"
    capsys.readouterr()
    assert optimum_cli("nm-permute", "evaluate", dense, "--text", none) == 1
    assert capsys.readouterr().err == f"error: text file {none} does not exist\n"


def test_a_command_does_its_work(
    tiny_checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = tiny_checkpoint()
    capsys.readouterr()
    assert optimum_cli("nm-permute", "verify", dense) == 0
    assert f"{dense}: 16 matrices, none of which has to be" in capsys.readouterr().out
    assert optimum_cli("nm-permute", "--quiet", "verify", dense, "--pattern=2:4") == 1
