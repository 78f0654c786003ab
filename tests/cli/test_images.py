# SPDX-License-Identifier: Apache-2.0
"""The command on models of images: prune, evaluate, and one error a mistake."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from commands import assert_one_error, nm_permute

from nm_permute_plugin.checkpoint.record import read_record
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.cli.prune import spread

CLASSES = {
    "dinov2-labels": "Dinov2ForImageClassification",
    "dinov2-bare": "Dinov2Model",
}
RECIPE = """
prune_stage:
  permutation_modifiers:
    LearnablePermutationModifier:
      method: learned
      learn: {{steps: 2}}
      search: {{rounds: 2}}
      ignore: [{ignore}]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(ignore="classifier"))
    return path


@pytest.mark.parametrize("case", ["dinov2-labels", "vit-labels", "deit-labels"])
def test_a_classifier_is_pruned_saved_and_measured(
    image_checkpoint, image_folder: Path, recipe: Path, tmp_path: Path, case: str
) -> None:
    dense, out = image_checkpoint(case, num_labels=3), tmp_path / "out"
    result = nm_permute(
        "prune", dense, recipe, out, "--images", image_folder, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert f"{out}: calibrated on 18 images" in result.stdout
    report = verify(out)
    assert report.faults == ()
    sparse = [row.module for row in report.rows if row.sparse]
    assert len(sparse) == 12
    assert {row.format for row in report.rows if row.sparse} == {"sparse-24-bitmask"}
    for changed in ("classifier", "projection"):
        assert not any(changed in name for name in sparse)
    result = nm_permute("evaluate", out, "--images", image_folder, "--dense", dense)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.search(r"out: top-1 \d+\.\d\d%, top-5 100.00% \(18 images", lines[0])
    (cosine,) = re.findall(r"cosine of the features to .*: (\d\.\d{4})$", lines[1])
    assert 0.3 < float(cosine) < 1
    converted = tmp_path / "converted"
    result = nm_permute("convert", out, converted, "--format", "dense")
    assert result.exit_code == 0, result.output
    again = nm_permute(
        "evaluate", converted, "--images", image_folder, "--dense", dense
    )
    assert again.stdout.splitlines()[1] == lines[1]


def test_an_encoder_is_pruned_and_measured_by_its_neighbours(
    image_checkpoint, image_folder: Path, recipe: Path, tmp_path: Path
) -> None:
    dense, out = image_checkpoint("dinov2-bare"), tmp_path / "out"
    recipe.write_text(RECIPE.format(ignore="lm_head"))
    result = nm_permute(
        "prune", dense, recipe, out, "--images", image_folder, "--samples", 9
    )
    assert result.exit_code == 0, result.output
    assert f"{out}: calibrated on 9 images" in result.stdout
    result = nm_permute("evaluate", out, "--images", image_folder)
    assert re.search(r"17 nearest others\)$", result.stdout)


@pytest.mark.parametrize(
    ("case", "tag", "loads"),
    [
        ("dinov2-labels", "image-classification", "AutoModelForImageClassification"),
        ("dinov2-bare", "image-feature-extraction", "AutoModel"),
    ],
)
@pytest.mark.parametrize("format", ["dense", "sparse-24-bitmask"])
def test_the_card_tells_how_to_load_and_measure_a_model_of_images(
    image_checkpoint, image_folder, recipe, tmp_path, case, tag, loads, format
) -> None:
    dense, out = image_checkpoint(case), tmp_path / "out"
    ignore = "classifier" if case == "dinov2-labels" else "lm_head"
    recipe.write_text(RECIPE.format(ignore=ignore) + f"      format: {format}\n")
    result = nm_permute(
        "prune", dense, recipe, out, "--images", image_folder, "--samples", 9
    )
    assert result.exit_code == 0, result.output
    card = (out / "README.md").read_text()
    assert f"pipeline_tag: {tag}\n" in card
    assert f"from transformers import {loads}\n" in card
    assert "nm-permute evaluate FOLDER --images IMAGES" in card
    assert "perplexity" not in card
    assert "vllm serve" not in card
    assert "loss on the validation rows" in card
    assert f"model = {loads}." in card
    auto = getattr(transformers, loads)
    assert type(auto.from_pretrained(out)).__name__ in CLASSES[case]


@pytest.mark.usefixtures("newest_is_best")
@pytest.mark.parametrize("case", ["dinov2-labels", "clip-vision"])
def test_a_fold_alone_changes_no_feature(
    image_checkpoint, image_folder: Path, recipe: Path, tmp_path: Path, case: str
) -> None:
    dense, out = image_checkpoint(case, num_labels=3), tmp_path / "out"
    ignore = "lm_head" if case == "clip-vision" else "classifier"
    folding = RECIPE.format(ignore=ignore) + "      prune: false\n"
    recipe.write_text(folding.replace("learned\n      learn: {steps: 2}", "search"))
    result = nm_permute("prune", dense, recipe, out, "--images", image_folder)
    assert result.exit_code == 0, result.output
    result = nm_permute("evaluate", out, "--images", image_folder, "--dense", dense)
    folded, cosine = result.stdout.splitlines()
    assert cosine.endswith(": 1.0000")
    before = nm_permute("evaluate", dense, "--images", image_folder).stdout
    assert folded.split(": ")[1] == before.strip().split(": ")[1]
    perms, _ = read_record(out)
    moved = {name.split(".")[0] for name, p in perms.items() if not is_identity(p)}
    assert moved >= {"hidden"} | ({"residual"} if case != "clip-vision" else set())


def is_identity(perm: torch.Tensor) -> bool:
    return torch.equal(perm, torch.arange(len(perm)))


def test_images_are_spread_evenly() -> None:
    files = [Path(str(i)) for i in range(10)]
    assert [file.name for file in spread(files, 4)] == ["0", "3", "6", "9"]
    assert spread(files, 10) == files


@pytest.mark.parametrize("command", ["prune", "evaluate"])
def test_text_and_images_together_are_refused(
    image_checkpoint, image_folder, recipe, tmp_path, text_file, command: str
) -> None:
    rest = [recipe, tmp_path / "out"] if command == "prune" else []
    both = ["--images", image_folder, "--text", text_file]
    result = nm_permute(command, image_checkpoint(), *rest, *both)
    assert_one_error(result, "are for different models; give one of them")


@pytest.mark.parametrize("command", ["prune", "evaluate"])
def test_a_model_is_given_what_it_takes(
    image_checkpoint,
    tiny_checkpoint,
    image_folder,
    recipe,
    tmp_path,
    text_file,
    command,
) -> None:
    rest = [recipe, tmp_path / "out"] if command == "prune" else []
    result = nm_permute(command, tiny_checkpoint(), *rest, "--images", image_folder)
    assert_one_error(
        result, "LlamaForCausalLM takes no images; give --text FILE instead"
    )
    result = nm_permute(
        command, image_checkpoint(name="seer"), *rest, "--text", text_file
    )
    assert_one_error(
        result, "Dinov2ForImageClassification takes no text; give --images"
    )
    result = nm_permute(
        command, image_checkpoint("qwen2.5-vl"), *rest, "--images", image_folder
    )
    assert_one_error(result, "takes text with its images")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["prune", "evaluate"])
def test_folders_that_are_no_use_are_refused(
    image_checkpoint, recipe, tmp_path, command: str
) -> None:
    rest = [recipe, tmp_path / "out"] if command == "prune" else []
    dense = image_checkpoint()
    result = nm_permute(command, dense, *rest, "--images", tmp_path / "nowhere")
    assert_one_error(result, "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    result = nm_permute(command, dense, *rest, "--images", tmp_path / "empty")
    assert_one_error(result, "empty holds no images")
    (tmp_path / "empty" / "cat").mkdir()
    for number in range(20):  # more than a batch
        (tmp_path / "empty" / "cat" / f"{number}.jpg").write_bytes(b"no picture")
    result = nm_permute(command, dense, *rest, "--images", tmp_path / "empty")
    assert_one_error(result, r"\d\.jpg is no image that can be read")
    assert not (tmp_path / "out").exists()


def test_classes_that_do_not_fit_are_refused(
    image_checkpoint, image_folder: Path, tmp_path: Path
) -> None:
    dense = image_checkpoint(num_labels=7)
    result = nm_permute("evaluate", dense, "--images", image_folder)
    assert_one_error(result, "class folder blue is none of the model's 7 labels")
    result = nm_permute("evaluate", dense, "--images", image_folder / "red")
    assert_one_error(result, r"0\.png stands in no class folder")
    one = tmp_path / "one"
    shutil.copytree(image_folder / "red", one / "red")
    result = nm_permute(
        "evaluate", image_checkpoint("vit-bare", "bare"), "--images", one
    )
    assert_one_error(result, "all images are of the class red")


@pytest.mark.parametrize("option", [["--base", "x", "--dense", "x"], ["--card"]])
def test_options_of_text_are_refused_with_images(
    image_checkpoint, image_folder: Path, option: list[str]
) -> None:
    result = nm_permute(
        "evaluate", image_checkpoint(), "--images", image_folder, *option
    )
    assert_one_error(result, "--base and --card are for --text")


def test_a_folder_without_a_checkpoint_is_refused(image_folder, tmp_path: Path) -> None:
    result = nm_permute("evaluate", tmp_path, "--images", image_folder)
    assert_one_error(result, r"holds no checkpoint \(no config\.json\)")


def test_a_class_that_is_not_known_is_refused(image_checkpoint, image_folder) -> None:
    folder = image_checkpoint()
    config = transformers.Dinov2Config.from_pretrained(folder)
    config.architectures = ["Unknown"]
    config.save_pretrained(folder)
    result = nm_permute("evaluate", folder, "--images", image_folder)
    assert_one_error(result, r"names no class of transformers .*\['Unknown'\]")


def test_a_model_of_text_and_images_is_pruned_with_text_alone(
    image_checkpoint, tiny_checkpoint, recipe, tmp_path: Path, words
) -> None:
    folder, out = image_checkpoint("qwen2.5-vl"), tmp_path / "out"
    (folder / "preprocessor_config.json").unlink()
    speaker = tiny_checkpoint(name="speaker")
    transformers.AutoTokenizer.from_pretrained(speaker).save_pretrained(folder)
    text = tmp_path / "text.txt"
    ids = torch.randint(3, 39, (640,), generator=torch.Generator().manual_seed(4))
    text.write_text(words(ids))
    recipe.write_text(RECIPE.format(ignore='"lm_head", "re:.*visual.*"'))
    result = nm_permute(
        "prune", folder, recipe, out, "--text", text, "--sequence-length", 32
    )
    assert result.exit_code == 0, result.output
    report = verify(out)
    assert report.faults == ()
    assert sum(row.sparse for row in report.rows) == 14
    result = nm_permute("evaluate", out, "--text", text, "--sequence-length", 32)
    assert re.search(r"perplexity \d+\.\d\d \(windows of 32 tokens", result.stdout)
    again = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(out)
    assert (
        float((again.model.visual.blocks[0].attn.qkv.weight == 0).float().mean()) < 0.1
    )


def test_perplexity_is_refused_where_no_token_is_predicted(
    image_checkpoint, text_file: Path
) -> None:
    result = nm_permute("evaluate", image_checkpoint("bertmodel"), "--text", text_file)
    assert_one_error(result, "BertModel predicts no next token")
