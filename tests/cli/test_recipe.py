# SPDX-License-Identifier: Apache-2.0
"""``recipe new`` writes the shipped recipes, ``show`` fills in, ``check`` looks over."""

from pathlib import Path

import pytest
import yaml
from commands import assert_one_error, nm_permute

SHIPPED = Path(__file__).parents[2] / "recipes"
LONGER = "--set learn.steps=2000 --set learn.multipliers.rows=1"
WORDS = {
    "2of4_learned": "",
    "2of4_learned_qwen25vl": "--ignore lm_head --ignore re:.*visual.*",
    "2of4_learned_then_fp8": "--then fp8",
    "2of4_learned_then_fp8static": "--then fp8-static",
    "2of4_learned_budget": "--set budget.dense_share=0.2",
    "2of4_learned_longer": LONGER,
    "2of4_learned_longer_then_recover": f"{LONGER} --recover end_to_end "
    "--set recover.end_to_end.steps=4500 --set recover.end_to_end.rate=0.002",
    "2of4_learned_sharded": "--set memory.shard=true --set memory.micro_batch_size=1",
    "2of4_learned_then_recover": "--recover blocks --recover end_to_end",
    "2of4_learned_then_recover_then_w4a16": "--recover end_to_end --then w4a16",
    "2of4_learned_then_smoothquant": "--then smoothquant --then w8a8",
    "2of4_learned_then_sparsegpt": "--then sparsegpt",
    "2of4_learned_then_w4a16": "--then w4a16",
    "2of4_learned_then_w8a8": "--then w8a8",
    "2of4_learned_then_wanda": "--then wanda",
    "2of4_learned_vit": "--set batch_size=32 --ignore classifier",
    "2of4_magnitude": "--score magnitude --method identity",
    "2of4_ria": "--score ria --method identity",
    "2of4_search": "--method search",
    "2of4_wanda": "--method identity",
    "4of8_learned": "--pattern 4:8",
}


def written(words: str) -> str:
    result = nm_permute("recipe", "new", *words.split())
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_shipped_recipe_has_its_words() -> None:
    assert set(WORDS) == {path.stem for path in SHIPPED.glob("*.yaml")}


@pytest.mark.parametrize("name", WORDS)
def test_new_writes_what_is_shipped(name: str) -> None:
    shipped = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    assert yaml.safe_load(written(WORDS[name])) == shipped


def test_what_a_recovery_learns_under_is_rounded_to_the_nearest() -> None:
    for scheme in ("fp8", "w4a16"):
        assert "GPTQModifier" in written(f"--then {scheme}")
        both = written(f"--recover end_to_end --then {scheme}")
        assert "QuantizationModifier" in both
        assert "GPTQ" not in both


def test_new_writes_a_file_and_replaces_none(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    assert nm_permute("recipe", "new", "--out", file).exit_code == 0
    before = file.read_text()
    assert before == written("")
    again = nm_permute("recipe", "new", "--method", "search", "--out", file)
    assert_one_error(again, "exists; name a new file")
    assert file.read_text() == before


def test_any_field_can_be_set() -> None:
    words = "--set learn.steps=20 --set batch_size=1 --recover end_to_end "
    words += "--set recover.end_to_end.steps=600 --set ignore=[lm_head,re:.*gate]"
    stage = yaml.safe_load(written(words))["prune_stage"]
    body = stage["permutation_modifiers"]["LearnablePermutationModifier"]
    assert body["learn"] == {"steps": 20}
    assert body["batch_size"] == 1
    assert body["recover"] == {"stages": ["end_to_end"], "end_to_end": {"steps": 600}}
    assert body["ignore"] == ["lm_head", "re:.*gate"]
    stage = yaml.safe_load(written("--then wanda --set learn.steps=30"))["prune_stage"]
    body = stage["permutation_modifiers"]["LearnablePermutationModifier"]
    assert body["learn"] == {"stages": ["swaps"], "steps": 30}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--then fp88", "--then fp88: there is no such step; did you mean fp8"),
        ("--then sparsegpt --then wanda", "one of them prunes"),
        ("--then fp8 --then w8a8", "--then w8a8: there is a GPTQModifier already"),
        ("--method learnd", "method: .*learned"),
        ("--pattern 2:3:4", "mask_structure"),
        ("--method identity --then wanda", "would change nothing"),
        ("--then wanda --recover blocks", "recover"),
        ("--set learn.steps", "give FIELD=VALUE, such as learn.steps=20"),
        ("--set method.steps=2", "method is 'learned', and no group"),
        ("--set learn.step=2", "learn.step: .*did you mean steps"),
        ("--set steps=2", "did you mean learn.steps or recover.end_to_end.steps"),
        ("--set learn.steps=[", "no YAML"),
    ],
)
def test_what_does_not_fit_is_one_line(words: str, message: str) -> None:
    assert_one_error(nm_permute("recipe", "new", *words.split()), message)


def test_what_is_shown_is_the_same_recipe_with_every_default(tmp_path: Path) -> None:
    from nm_permute_plugin.pruning.settings import Settings

    file = tmp_path / "recipe.yaml"
    file.write_text(
        "prune_stage:\n  permutation_modifiers:\n    LearnablePermutationModifier:\n"
        "      recover: end_to_end\n      learn: {steps: 20}\n"
        "  quantization_modifiers:\n    QuantizationModifier:\n"
        "      scheme: FP8_DYNAMIC\n      targets: [Linear]\n      ignore: [lm_head]\n"
    )
    result = nm_permute("recipe", "show", file)
    assert result.exit_code == 0, result.output
    stage = yaml.safe_load(result.stdout)["prune_stage"]
    body = stage["permutation_modifiers"]["LearnablePermutationModifier"]
    given = {"recover": ["end_to_end"], "learn": {"steps": 20}}
    assert Settings.model_validate(body) == Settings.model_validate(given)
    assert set(body) == set(Settings.model_fields)
    assert stage["quantization_modifiers"]["QuantizationModifier"]["scheme"] == (
        "FP8_DYNAMIC"
    )
    marked = [line for line in result.stdout.splitlines() if "# the default" in line]
    assert [line.split()[0] for line in marked] == ["steps:", "stages:"]
    assert marked[0].endswith("# the default is 200")
    (tmp_path / "shown.yaml").write_text(result.stdout)
    again = nm_permute("recipe", "show", tmp_path / "shown.yaml")
    assert again.stdout == result.stdout


def test_check_says_what_would_be_done(tmp_path: Path, tiny_checkpoint) -> None:
    file = SHIPPED / "2of4_learned_then_fp8.yaml"
    alone = nm_permute("recipe", "check", file)
    assert alone.exit_code == 0, alone.output
    assert "good (LearnablePermutationModifier, GPTQModifier)" in alone.stdout
    result = nm_permute("recipe", "check", file, "--model", tiny_checkpoint())
    assert result.exit_code == 0, result.output
    assert "2:4 in 14 linears" in result.stdout
    assert "residual (32 channels) permutes" in result.stdout


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mask_structure: '3:7'", "M=7"),
        ("targets: ['nothing']", "nothing"),
        ("learnd: {}", "did you mean learn"),
        ("method: search\n      learn: {steps: 3}", "nothing reads it"),
    ],
)
def test_check_refuses_what_is_certain_to_fail(
    tmp_path: Path, tiny_checkpoint, body: str, message: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "prune_stage:\n  permutation_modifiers:\n    LearnablePermutationModifier:\n"
        f"      {body}\n"
    )
    result = nm_permute("recipe", "check", file, "--model", tiny_checkpoint())
    assert_one_error(result, message)


def test_a_recipe_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for command in ("show", "check"):
        result = nm_permute("recipe", command, tmp_path / "recipe.yaml")
        assert_one_error(result, "does not exist")
