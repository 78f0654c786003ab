# SPDX-License-Identifier: Apache-2.0
"""All of the model's folder travels into its checkpoint, or is refused by name."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ours
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import nm_permute_plugin as nmp
from nm_permute_plugin.checkpoint.record import read_record
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.evaluation.pretrained import image_processor, load_checkpoint
from nm_permute_plugin.maths.permutation import invert

for folder in ("cli", "specs"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
from commands import nm_permute  # noqa: E402
from zoo import ZOO, tiny  # noqa: E402

pytestmark = pytest.mark.slow

QUICK = {"method": "search", "search": {"rounds": 2}}
CARD = """---
license: llama3.2
language:
- en
base_model: some/base
---
# Theirs
"""
TRAVELS = {
    "LICENSE": "mine",
    "preprocessor_config.json": "{}",
    "special_notes.json": "[1]",
    "assets/deep/words.txt": "words",
}
STAYS = {"pytorch_model.bin": "dense", "original/params.json": "{}"}
MTP = {"mtp.fc.weight": (32, 64), "mtp.norm.weight": (32,)}


@pytest.fixture
def folder(tiny_checkpoint) -> Path:
    """The folder of a model with what such folders hold."""
    made = tiny_checkpoint()
    (made / "original").mkdir()
    (made / "original" / "consolidated.00.pth").write_text("dense")
    for name, content in {**TRAVELS, **STAYS, "README.md": CARD}.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(content)
    return made


@pytest.fixture
def further(tiny_checkpoint) -> Path:
    """The folder of a model that predicts further tokens, which transformers leaves out."""
    made = tiny_checkpoint("qwen3", num_mtp_layers=1)
    tensors = load_file(made / "model.safetensors")
    tensors |= {name: torch.rand(shape) for name, shape in MTP.items()}
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    return made


def text_of(out: Path) -> dict[str, str]:
    names = [*TRAVELS, *STAYS]
    return {name: (out / name).read_text() for name in names if (out / name).exists()}


def stored(out: Path) -> dict[str, Tensor]:
    """All tensors that the index of a checkpoint names, or that its file holds."""
    index = out / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    return {k: v for file in files for k, v in load_file(out / file).items()}


def test_files_that_are_no_weights_travel(
    folder: Path, run_oneshot, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model = run_oneshot(folder, ours(**QUICK), out)
    assert text_of(out) == TRAVELS
    assert verify(out).good
    matter = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert matter["license"] == "llama3.2"
    assert matter["base_model"] == "some/base"
    assert "nm-permute adapt" in (out / "README.md").read_text()
    # A save by hand does the same, and what lies there already is not written over.
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "special_notes.json").write_text("[2]")
    model.save_pretrained(tmp_path / "again")
    again = TRAVELS | {"special_notes.json": "[2]"}
    assert text_of(tmp_path / "again") == again


def test_a_model_of_images_and_text_keeps_its_processor(
    tiny_checkpoint, words, chain_rows, image_folder: Path, tmp_path: Path
) -> None:
    """Text alone calibrates it, and its checkpoint still knows how images become pixels."""
    name, config, size = next(e.values for e in ZOO if e.id == "qwen2-vl")
    dense, out = tiny_checkpoint(), tmp_path / "out"
    tiny(name, config, size, torch.float32).save_pretrained(dense)
    pixels = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    kinds = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "size": {"shortest_edge": 64, "longest_edge": 4096},
    }
    (dense / "preprocessor_config.json").write_text(json.dumps(kinds | pixels))
    (tmp_path / "recipe.yaml").write_text(
        ours(**QUICK, targets=["re:.*language.*proj"])
    )
    # The tokens of images begin at 40.
    (tmp_path / "text.txt").write_text(words(chain_rows(40, 32, seed=3) % 40))
    given = [dense, tmp_path / "recipe.yaml", out, "--text", tmp_path / "text.txt"]
    result = nm_permute("prune", *given, "--sequence-length", 32, "--device", "cpu")
    assert result.exit_code == 0, result.output
    with Image.open(next(image_folder.rglob("*.png"))) as picture:
        before = image_processor(dense)(picture, return_tensors="pt")
        after = image_processor(out)(picture, return_tensors="pt")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    count = int(after["image_grid_thw"].prod()) // 4
    tokens = torch.tensor([[1, 42, *[40] * count, 43, 2]])
    kinds = (tokens == 40).int()
    model = load_checkpoint(out, "cpu")
    answer = model(input_ids=tokens, mm_token_type_ids=kinds, **after)
    assert answer.logits.isfinite().all()


def test_a_model_in_memory_finds_its_folder(
    folder: Path, chain_rows, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"input_ids": chain_rows(12, 32, seed=1)}]
    pruned = nmp.prune(model, nmp.read_samples(model, rows), nmp.Settings(**QUICK))
    nmp.save(model, tmp_path / "out", pruned)
    assert text_of(tmp_path / "out") == TRAVELS


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({}, r"`spaces: \[hidden, value\]`"),
        ({"spaces": ["residual"]}, r"`spaces: \[hidden, v"),
    ],
    ids=["all", "residual"],
)
def test_tensors_that_would_stay_in_the_old_order_are_refused_before_the_work(
    further: Path, run_oneshot, tmp_path: Path, fields: dict, remedy: str
) -> None:
    said = (
        r"mtp\.fc\.weight \[32, 64\] and 1 tensors more, which transformers does not "
        rf"load into Qwen3ForCausalLM: .* space residual move\. Write {remedy}"
    )
    with pytest.raises(ValueError, match=said):
        run_oneshot(further, ours(**QUICK, **fields), tmp_path / "out", [[1] * 32] * 12)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["auto", "dense"])
@pytest.mark.parametrize(
    "fields",
    [QUICK | {"spaces": ["hidden", "value"]}, {"method": "identity"}],
    ids=["hidden", "identity"],
)
def test_tensors_that_no_space_touches_are_carried(
    further: Path, run_oneshot, tmp_path: Path, fields: dict, form: str
) -> None:
    out = tmp_path / "out"
    run_oneshot(further, ours(**fields, format=form), out)
    before, after = load_file(further / "model.safetensors"), stored(out)
    assert all(torch.equal(before[name], after[name]) for name in MTP)
    assert verify(out).good
    AutoModelForCausalLM.from_pretrained(out)


def test_tensors_are_carried_without_llm_compressor_too(
    further: Path, chain_rows, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(further)
    rows = [{"input_ids": chain_rows(12, 32, seed=1)}]
    settings = nmp.Settings(**QUICK, spaces=["hidden", "value"])
    pruned = nmp.prune(model, nmp.read_samples(model, rows), settings)
    nmp.save(model, tmp_path / "out", pruned)
    before, after = load_file(further / "model.safetensors"), stored(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in MTP)
    assert nmp.verify(tmp_path / "out").good


def test_a_head_that_another_class_leaves_out_is_no_obstacle(
    folder: Path, tmp_path: Path, chain_rows
) -> None:
    kind = AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, pad_token_id=0)
    rows = [{"input_ids": chain_rows(12, 32, seed=1)}]
    settings = nmp.Settings(**QUICK, ignore=["score"])
    pruned = nmp.prune(model, nmp.read_samples(model, rows), settings)
    nmp.save(model, tmp_path / "out", pruned)
    assert "lm_head.weight" not in stored(tmp_path / "out")


@pytest.mark.parametrize("value", [{"temperature": 0.7}, {"top_p": 0.9, "top_k": 3}])
def test_generation_settings_that_transformers_would_not_save_travel(
    folder: Path, run_oneshot, tmp_path: Path, value: dict
) -> None:
    given = {"do_sample": False, "eos_token_id": 2, **value}
    (folder / "generation_config.json").write_text(json.dumps(given))
    model = run_oneshot(folder, ours(**QUICK), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in given} == given
    assert model.generation_config.to_dict().items() >= value.items()


def test_the_record_of_two_folds_is_told_from_the_first_model(
    folder: Path, run_oneshot, newest_is_best, tmp_path: Path
) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    first = ours(**QUICK, prune=False)
    run_oneshot(folder, first, once)
    run_oneshot(once, ours(**QUICK, prune=False, score="magnitude"), twice)
    dense, after = load_file(folder / "model.safetensors"), stored(twice)
    perms, report = read_record(twice)
    name = "model.layers.1.mlp.down_proj.weight"
    rows, columns = invert(perms["residual"]), invert(perms["hidden.1"])
    assert torch.equal(after[name][rows][:, columns], dense[name])
    # Both runs moved channels, so that neither's permutations alone undo the fold.
    alone, told = read_record(once)
    rows, columns = invert(alone["residual"]), invert(alone["hidden.1"])
    assert not torch.equal(after[name][rows][:, columns], dense[name])
    assert report["earlier"] == told
    assert report["base_model"] == "dense"


def test_two_folds_of_one_model_in_memory_are_one_record(
    folder: Path, run_oneshot, newest_is_best, tmp_path: Path
) -> None:
    model = run_oneshot(folder, ours(**QUICK, prune=False))
    both = ours(**QUICK, prune=False, score="magnitude")
    run_oneshot(folder, both, tmp_path / "out", model=model)
    perms, _ = read_record(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    rows, columns = invert(perms["residual"]), invert(perms["hidden.1"])
    dense = load_file(folder / "model.safetensors")[name]
    assert torch.equal(stored(tmp_path / "out")[name][rows][:, columns], dense)


def test_a_record_of_another_model_is_refused_before_the_work(
    folder: Path, tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    run_oneshot(folder, ours(**QUICK, prune=False), tmp_path / "out")
    other = tiny_checkpoint(name="other", intermediate_size=64)
    (tmp_path / "out" / "nm_permute").rename(other / "nm_permute")
    said = r"other/nm_permute tells of an earlier fold of 48 channels of space 'hidden"
    with pytest.raises(ValueError, match=said):
        run_oneshot(other, ours(**QUICK), rows=[[1] * 32] * 12)
