# SPDX-License-Identifier: Apache-2.0
"""``prune --dry-run`` says what a run would do and take, and writes nothing."""

import re
from pathlib import Path

import pytest
from commands import assert_one_error, listing, nm_permute, prune

from nm_permute_plugin.pruning.estimate import probe


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    ready: list[str], tmp_path: Path
) -> None:
    result = prune(tmp_path, "--text", tmp_path / "text.txt", "--dry-run")
    assert result.exit_code == 0, result.output
    said = result.stdout
    assert "2:4 in 14 linears" in said
    assert "hidden.{0-1} (48 channels)" in said
    assert "lm_head stays dense: `ignore` names lm_head" in said
    assert (
        "settings that are not the defaults: method: search; search.rounds: 2" in said
    )
    stages = re.findall(
        r"^\| (\w[\w ]*) \| [\d.]+ \w+ \| [\d.]+ [MG]iB \|$", said, re.M
    )
    assert stages == ["load", "statistics", "search", "fold and prune", "save"]
    told = re.findall(r"^Measured in [\d.]+ \w+: (\w[\w ]*)$", result.stderr, re.M)
    assert told == stages[1:]
    assert "Measuring a few steps of every stage on cpu: about " in result.stderr
    assert "disk: the weights take" in said
    assert "wrote nothing" in said
    assert listing(tmp_path) == ready


def test_what_is_certain_to_fail_is_found_without_loading(
    ready: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "dense" / "out"
    words = ("--text", tmp_path / "text.txt", "--dry-run")
    assert_one_error(prune(tmp_path, *words, out=out), "lies inside of the folder")
    assert listing(tmp_path) == ready


def test_a_model_that_does_not_fit_is_refused_with_a_remedy(
    ready: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Simulated: the device only says that it has so little free.
    monkeypatch.setattr(
        "nm_permute_plugin.pruning.estimate.meter.free_memory", lambda device: 100_000
    )
    monkeypatch.setattr(probe, "free_memory", lambda device: 100_000)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "      batch_size: 8\n")
    result = prune(tmp_path, "--text", tmp_path / "text.txt", "--dry-run")
    assert_one_error(result, "statistics needs .* write batch_size: 1, or use a")
    assert "2:4 in 14 linears" in result.stdout
    assert listing(tmp_path) == ready


def test_images_are_measured_too(
    image_checkpoint, image_folder: Path, tmp_path: Path
) -> None:
    model = image_checkpoint()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "prune_stage:\n  permutation_modifiers:\n    LearnablePermutationModifier:\n"
        "      batch_size: 4\n      learn: {steps: 2}\n      ignore: [classifier]\n"
    )
    words = ("prune", model, recipe, tmp_path / "out", "--images", image_folder)
    result = nm_permute(*words, "--device", "cpu", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "| learn |" in result.stdout
    assert not (tmp_path / "out").exists()
