# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe is what its file name says, and has its row in the README."""

import re
from pathlib import Path

import pytest
import typer
from llmcompressor.recipe import Recipe

from nm_permute_plugin.cli.app import app
from nm_permute_plugin.modifiers import LearnablePermutationModifier
from nm_permute_plugin.modifiers.recipe import read_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))

FOLLOWS = {
    None: [],
    "recover": [],  # it is the same modifier that recovers
    "sparsegpt": ["SparseGPTModifier"],
    "wanda": ["WandaPruningModifier"],
    "fp8": ["GPTQModifier"],
    "fp8static": ["GPTQModifier"],
    "w8a8": ["QuantizationModifier"],
    "w4a16": ["GPTQModifier"],
    "recover_then_w4a16": ["QuantizationModifier"],
    "smoothquant": ["SmoothQuantModifier", "QuantizationModifier"],
}
NAME = re.compile(
    r"(\d+)of(\d+)_([a-z]+)(?:_(vit|qwen25vl|sharded|budget|longer))?(?:_then_((?:recover_then_)?[a-z0-9]+))?"
)
IGNORED = {
    None: ["lm_head"],
    "sharded": ["lm_head"],
    "budget": ["lm_head"],
    "longer": ["lm_head"],
    "vit": ["classifier"],
    "qwen25vl": ["lm_head", "re:.*visual.*"],
}


def test_there_are_recipes() -> None:
    assert {"2of4_learned", "2of4_search", "2of4_wanda"} <= {f.stem for f in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_yields_what_its_name_says(file: Path) -> None:
    found = NAME.fullmatch(file.stem)
    assert found, "named <n>of<m>_<method or score>[_<model>][_then_<modifier>]"
    n, m, word, model, follows = found.groups()
    first, *others = Recipe.create_instance(read_recipe(file)).modifiers
    assert type(first) is LearnablePermutationModifier
    assert first.mask_structure == f"{n}:{m}"
    if word in ("learned", "search"):
        assert (first.method, first.score) == (word, "wanda")
    else:
        assert (first.method, first.score) == ("identity", word)
    assert list(first.ignore) == IGNORED[model]
    assert bool(first.recover.stages) == ("recover" in (follows or ""))
    names = [type(modifier).__name__ for modifier in others]
    assert names == FOLLOWS[follows]
    prunes = [m for m in others if hasattr(m, "mask_structure")]
    assert first.prune == (not prunes)
    assert all(m.mask_structure == first.mask_structure for m in prunes)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_has_its_row_in_the_readme(file: Path) -> None:
    lines = (FOLDER / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and file.name in line]
    assert len(rows) == 1


def test_the_readme_names_no_recipe_that_is_not_there() -> None:
    named = re.findall(r"\b\w+\.yaml\b", (FOLDER / "README.md").read_text())
    assert {name for name in named if NAME.match(name)} == {f.name for f in FILES}


def shown_commands() -> list[list[str]]:
    """The commands of the READMEs: all that stands in their blocks, word by word."""
    texts = [
        (FOLDER.parent / name / "README.md").read_text()
        for name in ("", "recipes", "benchmarks")
    ]
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(texts), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("#")[0].split("&&")]
    return [words for part in parts if (words := part.split())[:1] == ["nm-permute"]]


def test_the_options_that_the_readmes_show_exist() -> None:
    commands = dict(typer.main.get_command(app).commands)
    parts = commands.pop("recipe").commands  # its options stand behind its parts
    shown = [
        (words[1], re.findall(r"--[a-z-]+", " ".join(words)))
        for words in shown_commands()
    ]
    assert {"prune", "evaluate"} <= {name for name, _ in shown}
    for name, options in shown:
        if name == "lm-eval":  # passes options on to lm-eval
            options = [option for option in options if option in ("--dense", "--card")]
        of = parts.values() if name == "recipe" else [commands[name]]
        params = [param for command in of for param in command.params]
        known = {x for param in params for x in [*param.opts, *param.secondary_opts]}
        assert set(options) <= known, name


def test_the_recipe_that_the_readme_shows_is_the_default(tmp_path: Path) -> None:
    readme = (FOLDER.parent / "README.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "shown.yaml").write_text(shown)
    parsed = Recipe.create_instance(read_recipe(tmp_path / "shown.yaml")).modifiers
    default = Recipe.create_instance(read_recipe(FOLDER / "2of4_learned.yaml"))
    assert [m.model_dump() for m in parsed] == [
        m.model_dump() for m in default.modifiers
    ]
