# SPDX-License-Identifier: Apache-2.0
"""What is built to be installed is whole, and what messages say to install exists."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from nm_permute_plugin._words import install
from nm_permute_plugin.cli import common

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
WHEEL = SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]
EXTRAS = set(PROJECT["optional-dependencies"])
SAID = [
    *(ROOT / "nm_permute_plugin").rglob("*.py"),
    *(ROOT / "benchmarks").glob("*.py"),
    *(ROOT / folder / "README.md" for folder in ("", "benchmarks", "recipes")),
]
INSTALLED = re.compile(
    r"pip install .*?(?:nm-permute-plugin|[\s'\"]\.)\[([\w,-]+)\]"
    r"|install\(['\"](\w+)['\"]\)"
)


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a wheel or an sdist as pip does, in this environment."""
    pytest.importorskip("hatchling")
    code = f"import hatchling.build as b, sys; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", ROOT, tmp_path_factory.mktemp("wheel")))


def text_of(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [x for x in wheel.namelist() if x.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def package_files() -> set[str]:
    """
    All that lies in the package, templates and kernels as well, but what is ignored; each
    where the wheel puts it, which may be in another package's folder.
    """
    moved = WHEEL.get("force-include", {})
    return {
        moved.get(name := str(path.relative_to(ROOT)), name)
        for path in (ROOT / "nm_permute_plugin").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == package_files()
    assert {"nm_permute_plugin/py.typed"} < held
    assert {name for name in held if name.endswith(".cu")}
    assert "Apache License" in text_of(wheel, "licenses/LICENSE")


def test_the_wheel_says_what_the_project_says(wheel: zipfile.ZipFile) -> None:
    said = Parser().parsestr(text_of(wheel, "METADATA"))
    assert said["Name"] == PROJECT["name"]
    assert said["Version"] == PROJECT["version"]
    assert set(said.get_all("Provides-Extra")) == EXTRAS
    assert {"Typing :: Typed", *PROJECT["classifiers"]} >= {*said.get_all("Classifier")}
    assert said.get_payload().strip() == (ROOT / "README.md").read_text().strip()


def test_every_entry_point_can_be_loaded(wheel: zipfile.ZipFile) -> None:
    lines = text_of(wheel, "entry_points.txt").splitlines()
    group, found = "", {}
    for line in filter(None, map(str.strip, lines)):
        if line.startswith("["):
            group = line.strip("[]")
            continue
        name, value = (part.strip() for part in line.split("=", 1))
        found[group, name] = EntryPoint(name, value, group).load()
    assert callable(found["console_scripts", "nm-permute"])
    assert callable(found["vllm.general_plugins", "nm_sparse24"])


def test_the_sdist_builds_the_same_wheel(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    with tarfile.open(build("sdist", ROOT, tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "recipes/2of4_learned.yaml"):
        assert (unpacked / name).read_text() == (ROOT / name).read_text()
    again = zipfile.ZipFile(build("wheel", unpacked, tmp_path))
    assert sorted(again.namelist()) == sorted(wheel.namelist())


def test_extras_that_we_tell_to_install_exist() -> None:
    told = {
        (str(file.relative_to(ROOT)), extra)
        for file in SAID
        for line in file.read_text().splitlines()
        for extras in INSTALLED.findall(line)
        for extra in "".join(extras).split(",")
    }
    assert {extra for _, extra in told} >= {"demo", "test", "vllm", "transformers"}
    assert [(file, extra) for file, extra in sorted(told) if extra not in EXTRAS] == []


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("transformers", "evaluate", "transformers"),
        ("transformers.models.auto", "prune", "compress"),
        ("datasets", "evaluate", "compress"),
        ("llmcompressor", "demo", "demo"),
    ],
)
def test_a_module_that_is_missing_is_told_with_its_extra(
    module: str, command: str, extra: str
) -> None:
    error = ModuleNotFoundError(f"No module named {module!r}", name=module)
    said = f"No module named {module!r}: {install(extra)}"
    assert common._one_line(error, command) == said
    assert set(common.EXTRAS.values()) <= EXTRAS


def test_extras_that_name_others_name_real_ones() -> None:
    wanted = PROJECT["optional-dependencies"].values()
    named = [
        extra
        for line in (line for lines in wanted for line in lines)
        if (found := re.match(r"nm-permute-plugin\[([\w,-]+)\]", line))
        for extra in found[1].split(",")
    ]
    assert named
    assert [extra for extra in named if extra not in EXTRAS] == []
