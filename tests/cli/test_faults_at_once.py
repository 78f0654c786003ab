# SPDX-License-Identifier: Apache-2.0
"""Arguments that must fail are told all at once, before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import assert_one_error, listing, nm_permute, prune

ALL = """error: 5 things would make this run fail:
- text file gone.txt does not exist
- text file texts is a folder: give it as --dataset, or its files one by one, for \
example texts/one.txt
- nosuchfolder does not exist; give a model's folder, or its name on the Hugging Face hub \
as ORGANISATION/NAME
- the recipe 2of4.yaml does not exist; `nm-permute recipe new --out FILE` writes one
- --device tpu9 is no device; give cpu or cuda
"""

NOTHING_HEAVY = """
import sys
from nm_permute_plugin.cli.app import app
try:
    app(sys.argv[1:], prog_name="nm-permute")
finally:
    heavy = {"torch", "transformers", "llmcompressor", "datasets"} & set(sys.modules)
    print(sorted(heavy))
"""


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("one")


@pytest.mark.usefixtures("texts")
def test_prune_tells_all_faults_of_its_arguments(tmp_path: Path) -> None:
    words = [
        "nosuchfolder",
        "2of4.yaml",
        "out",
        "--text",
        "gone.txt",
        "--text",
        "texts",
    ]
    before = listing(tmp_path)
    result = nm_permute("prune", *words, "--device", "tpu9")
    assert result.exit_code == 1
    assert result.stderr == ALL
    assert listing(tmp_path) == before


@pytest.mark.usefixtures("texts")
def test_evaluate_and_sample_tell_all_faults_of_theirs() -> None:
    result = nm_permute("evaluate", "gone", "--dense", "away", "--text", "gone.txt")
    assert result.stderr.startswith("error: 3 things would make this run fail:\n- text")
    result = nm_permute("sample", "gone", "texts")
    assert result.stderr.startswith(
        "error: 2 things would make this run fail:\n- texts"
    )


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize(
    "words",
    [
        ["prune", "nosuchfolder", "2of4.yaml", "out", "--text", "gone.txt"],
        ["evaluate", "nosuchfolder", "--text", "gone.txt", "--device", "cpu"],
        ["sample", "nosuchfolder", "new.txt"],
        ["verify", "nosuchfolder"],
    ],
    ids=lambda words: words[0],
)
def test_a_fault_is_told_before_anything_heavy_is_imported(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOTHING_HEAVY, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "nosuchfolder does not exist" in done.stderr
    assert done.stdout == "[]\n"


@pytest.mark.usefixtures("ready")
def test_one_fault_alone_is_one_line(tmp_path: Path) -> None:
    result = prune(tmp_path, "--text", tmp_path / "gone.txt")
    assert_one_error(result, r"error: text file .*gone\.txt does not exist$")


@pytest.mark.parametrize("command", ["prune", "evaluate"])
def test_a_text_without_its_option_is_hinted_at(command: str) -> None:
    paths = ["MODEL", "RECIPE", "OUT"] if command == "prune" else ["MODEL"]
    result = nm_permute(command, *paths, "train.txt", "more.txt")
    assert result.exit_code == 2
    said = " ".join(result.stderr.replace("│", " ").split())
    assert "text is given as --text train.txt" in said
