# SPDX-License-Identifier: Apache-2.0
"""The command checks specs: exact ones pass, wrong ones end in a non-zero exit."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from nm_permute_plugin.cli.app import app
from nm_permute_plugin.specs.architectures import LLAMA, SPECS

sys.path.insert(0, str(Path(__file__).parents[1] / "specs"))  # for the zoo
from zoo import ZOO, tiny  # noqa: E402

CASES = {case.id: case.values for case in ZOO}


def spec(*words: object) -> Result:
    return CliRunner().invoke(app, ["spec", *(str(word) for word in words)])


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    return line


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A factory: the folder of a model of the zoo, or of its config alone."""

    def of(case: str, weights: bool = True) -> Path:
        name, config, options = CASES[case]
        model = tiny(name, config, options, torch.float32)
        model.save_pretrained(tmp_path / "model")
        if not weights:
            for file in (tmp_path / "model").glob("*.safetensors"):
                file.unlink()
        return tmp_path / "model"

    return of


@pytest.mark.parametrize(
    "case",
    [
        "llama-mha-tied",
        "qwen2moe-one-dense-layer",
        "bertforsequenceclassification",
        "vit-labels",
        "clip",
        "qwen2.5-vl",
    ],
)
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config"])
def test_a_known_spec_is_exact(folder, case: str, weights: bool) -> None:
    result = spec(folder(case, weights))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith(": exact")
    # A model made from its config has norms of ones and biases of zeros.
    assert ("constant parameters had random values" in result.stdout) == (not weights)


def test_spaces_and_their_readers_are_listed(folder) -> None:
    lines = spec(folder("vit-bare")).stdout.splitlines()
    assert lines[2:4] == [
        "| value.{i} | 2 | 32 | heads of 8 | layers.{i}.attention.o_proj |",
        "| hidden.{i} | 2 | 48 | all | layers.{i}.mlp.fc2 |",
    ]
    assert "no space permutes the inputs of layers.{i}.mlp.fc1 (output)" in lines


def test_a_few_layers_stand_for_all(folder) -> None:
    result = spec(folder("gemma3-mqa"), "--layers", 1)
    assert result.exit_code == 0, result.output
    assert "| hidden.{i} | 1 | 48 |" in result.stdout


def test_a_spec_from_a_file_is_checked(folder, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(dict(LLAMA)))
    result = spec(folder("llama-gqa"), "--spec", file)
    assert result.exit_code == 0, result.output


def test_a_spec_that_changes_the_outputs_is_wrong(folder, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    down = "model.layers.{i}.mlp.down_proj.weight"
    file.write_text(yaml.safe_dump({**LLAMA, down: "residual _"}))
    error = refused(spec(folder("llama-gqa"), "--spec", file))
    assert "random permutations change the outputs by" in error
    assert "the spec is wrong" in error


WRONG = [
    ("- a list", "holds no spec"),
    ("", "holds no spec"),
    ("a: [b", "is no YAML"),
    ("model.norm.weight: 3", "'model.norm.weight': 3 is no line of a spec"),
    ("model.norm.weight: resdual", "parameter model.embed_tokens.weight"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_file_that_holds_no_spec_is_refused(
    folder, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    assert message in refused(spec(folder("llama-gqa"), "--spec", file))


def test_what_is_missing_is_named(folder, tmp_path: Path) -> None:
    assert "holds no model" in refused(spec(tmp_path / "nowhere"))
    model = folder("llama-gqa")
    missing = spec(model, "--spec", tmp_path / "nowhere.yaml")
    assert "nowhere.yaml does not exist" in refused(missing)


def test_an_unknown_class_is_refused_with_the_way_out(folder) -> None:
    model = folder("llama-gqa", weights=False)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForTokenClassification"]})
    )
    assert "no permutation spec for LlamaForTokenClass" in refused(spec(model))
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["No"]}))
    assert "names no class of transformers" in refused(spec(model))


def test_a_width_that_the_pattern_does_not_divide_can_be_ignored(folder) -> None:
    model = folder("vit-three-heads-no-qkv-bias")
    assert "add 'vit.layers.0.attention.q_proj'" in refused(
        spec(model, "--pattern", "4:8")
    )
    ignore = ["--ignore", "re:vit.*(_proj|fc1)$", "--ignore", "classifier"]
    result = spec(model, "--pattern", "4:8", *ignore)
    assert result.exit_code == 0, result.output


def test_the_known_classes_are_listed() -> None:
    result = spec("--list")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == list(SPECS)


def test_an_ignore_that_matches_nothing_is_refused(folder) -> None:
    model = folder("llama-gqa", weights=False)
    said = refused(spec(model, "--ignore", "lm_hed"))
    assert "'lm_hed' matches no module of the model; did you mean 'lm_head'?" in said
