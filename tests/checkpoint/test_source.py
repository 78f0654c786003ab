# SPDX-License-Identifier: Apache-2.0
"""Which files of a model's folder travel: all that are not weights, and no secret."""

import json
import os
from pathlib import Path

import huggingface_hub.constants
import pytest
from checkpoint_files import MakeDense
from loguru import logger
from transformers import AutoModelForCausalLM

from nm_permute_plugin.checkpoint.base_card import base_matter
from nm_permute_plugin.checkpoint.source import (
    carry_files,
    check_files,
    folder_of,
    list_files,
    module_folders,
)
from nm_permute_plugin.checkpoint.writer import convert

TRAVELS = [
    "LICENSE",
    "README.md",
    "additional_chat_templates/tools.jinja",
    "assets/deep/words.txt",
    "chat_template.jinja",
    "modeling_own.py",
    "preprocessor_config.json",
    "special_notes.json",
    "tokenizer.model",
    "vocab.txt",
]
WEIGHTS = [
    "MODEL.ONNX",
    "adapter_config.json",
    "adapter_model.safetensors",
    "consolidated.00.pth",
    "flax_model.msgpack",
    "model-q4.gguf",
    "model.fp16.safetensors",
    "model.onnx_data",
    "model.safetensors.index.json",
    "optimizer.pt",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "training_args.bin",
]
FOLDERS = {
    "checkpoint-500": ["config.json", "model.safetensors"],
    "onnx": ["config.json", "deep/model.onnx"],
    "original": ["params.json", "tokenizer.model", "consolidated.00.pth"],
}
BOOKKEEPING = [".git/config", ".cache/huggingface/x.lock", "__pycache__/m.pyc", ".env"]


def make(folder: Path, *names: str) -> Path:
    """A folder of files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names_in(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(path.relative_to(folder)) for path in found)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with one of everything."""
    inside = [f"{name}/{file}" for name, files in FOLDERS.items() for file in files]
    made = make(tmp_path / "source", *TRAVELS, *WEIGHTS, *inside, *BOOKKEEPING)
    (made / "model.safetensors.index.json").write_text("{}")
    return made


@pytest.fixture
def told() -> list[str]:
    """What is logged."""
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), format="{level} {message}")
    yield lines
    logger.remove(sink)


def test_files_that_are_no_weights_travel_and_the_others_are_told(
    source: Path, tmp_path: Path, told: list[str]
) -> None:
    shard = "model-00001-of-00001.safetensors"
    make(source, shard, "nm_permute/permutations.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    check_files(source)
    carry_files(source, tmp_path / "out")
    assert names_in(tmp_path / "out") == TRAVELS
    listed = sorted([*WEIGHTS, *(f"{name}/" for name in FOLDERS)])
    # What the checkpoint itself replaces is no news.
    mine = [shard, "nm_permute/"]
    assert list(list_files(source).weights) == sorted([*listed, *mine])
    (line,) = told
    said = line.split("do not travel: ")[1].strip().split(", ")
    assert said == [name for name in listed if name != index.name]


def test_no_file_is_written_over(source: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    target = make(tmp_path / "target", "vocab.txt")
    (out / "assets" / "deep").mkdir(parents=True)
    (out / "LICENSE").write_text("ours")
    (out / "assets" / "deep" / "words.txt").write_text("ours")
    (out / "tokenizer.model").symlink_to("nowhere")
    carry_files(source, out, target)
    assert (out / "LICENSE").read_text() == "ours"
    assert (out / "assets" / "deep" / "words.txt").read_text() == "ours"
    assert os.readlink(out / "tokenizer.model") == "nowhere"
    assert not (out / "vocab.txt").exists()


def test_links_that_lead_out_stay_and_are_told(
    source: Path, tmp_path: Path, told: list[str]
) -> None:
    make(tmp_path / "elsewhere", "secret.txt")
    (source / "notes.txt").symlink_to(tmp_path / "elsewhere" / "secret.txt")
    (source / "assets" / "more.txt").symlink_to("../../elsewhere/secret.txt")
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "loop").symlink_to(".")
    (source / "broken.txt").symlink_to("nowhere")
    (source / "copy.txt").symlink_to("LICENSE")
    check_files(source)
    carry_files(source, tmp_path / "out")
    # A link inside of the folder becomes the file that it leads to.
    assert names_in(tmp_path / "out") == sorted([*TRAVELS, "copy.txt"])
    assert not (tmp_path / "out" / "copy.txt").is_symlink()
    assert (tmp_path / "out" / "copy.txt").read_text() == "LICENSE"
    (warning,) = (line for line in told if line.startswith("WARNING"))
    names = ("notes.txt", "assets/more.txt", "linked", "loop")
    assert all(name in warning for name in names)


def test_what_is_no_file_is_passed_over(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "pipe")  # whoever opens it waits for ever
    carry_files(source, tmp_path / "out")
    assert names_in(tmp_path / "out") == TRAVELS


def test_a_folder_inside_of_the_source_does_not_take_itself_along(source: Path) -> None:
    out = make(source / "results" / ".new.unfinished")
    carry_files(source, out)
    assert names_in(out) == TRAVELS


def test_a_folder_that_is_gone_is_told(tmp_path: Path, told: list[str]) -> None:
    carry_files(tmp_path / "gone", tmp_path / "out")
    assert "gone is gone: what it held beside the weights" in told[0]


def test_a_file_that_cannot_be_read_is_refused_before_the_work(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in: whoever runs the tests may read every file.
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "LICENSE")
    with pytest.raises(PermissionError, match=r"source/LICENSE may not be read, and"):
        check_files(source)


def test_modules_of_a_sentence_encoder_travel_with_their_weights(
    source: Path, tmp_path: Path
) -> None:
    make(source, "1_Pooling/config.json", "2_Dense/config.json")
    make(source, "2_Dense/model.safetensors")
    paths = ["", "1_Pooling", "2_Dense", "../elsewhere", "original/deep"]
    modules = [{"idx": i, "path": path} for i, path in enumerate(paths)]
    (source / "modules.json").write_text(json.dumps(modules))
    assert module_folders(source) == {
        "1_Pooling": [],
        "2_Dense": ["model.safetensors"],
    }
    carry_files(source, tmp_path / "out")
    more = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    expected = [*TRAVELS, *more, "modules.json"]
    assert names_in(tmp_path / "out") == sorted(expected)


@pytest.mark.parametrize("content", ["{", "{}", "[1]", "[{}]", "null"])
def test_a_file_of_modules_that_is_none_names_none(source: Path, content: str) -> None:
    (source / "modules.json").write_text(content)
    assert module_folders(source) == {}


def test_a_model_of_the_hub_has_its_folder_in_the_cache(
    tiny_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make(tiny_checkpoint(), "LICENSE", "preprocessor_config.json")
    commit, cache = "0" * 40, tmp_path / "hub"
    kept = cache / "models--some--model"
    snapshot = kept / "snapshots" / commit
    for folder in (kept / "blobs", kept / "refs", snapshot):
        folder.mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(dense.iterdir())):
        file.rename(kept / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    model = AutoModelForCausalLM.from_pretrained("some/model", cache_dir=cache)
    found = folder_of(model)
    assert found == snapshot
    carry_files(found, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "LICENSE"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_model_of_the_hub_whose_cache_is_gone_has_none(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = tiny_model("llama")
    assert folder_of(model) is None
    model.name_or_path = "some/model"
    assert folder_of(model) is None
    assert told == []
    model.config._commit_hash = "0" * 40
    assert folder_of(model) is None
    assert "Files of some/model that are no weights" in told[0]


def test_convert_takes_the_same_files_along(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense = make(make_dense("bf16"), *TRAVELS, "original/model.pth", "old.bin", ".env")
    make(dense, "nm_permute/permutations.safetensors", "nm_permute/more.txt")
    convert(dense, tmp_path / "out", "sparse-24-bitmask")
    found = names_in(tmp_path / "out")
    assert set(TRAVELS) <= set(found)
    assert {"nm_permute/permutations.safetensors", "nm_permute/more.txt"} <= set(found)
    assert not {"old.bin", ".env", "original/model.pth"} & set(found)
    assert "model.safetensors.index.json" in found


CARDS = {
    "license": ("license: apache-2.0", {"license": "apache-2.0"}),
    "all": (
        "license: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: [en, no]\n"
        "tags: [chat, 1]\nbase_model:\n- a/b\nlibrary_name: peft\nmodel-index: []",
        {
            "license": "other",
            "license_name": "own",
            "license_link": "LICENSE",
            "language": ["en", "no"],
            "tags": ["chat", "1"],
            "base_model": ["a/b"],
        },
    ),
    "no mapping": ("- a", {}),
    "no YAML": ("license: [", {}),
    "empty": ("", {}),
}


@pytest.mark.parametrize("case", CARDS)
def test_the_front_matter_of_a_card_is_read(tmp_path: Path, case: str) -> None:
    text, expected = CARDS[case]
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n# Title\n---\n")
    assert base_matter(tmp_path) == expected


@pytest.mark.parametrize("text", ["", "# Title\n---\nlicense: mit\n---\n", "---\na: 1"])
def test_a_card_without_front_matter_says_nothing(tmp_path: Path, text: str) -> None:
    assert base_matter(tmp_path) == {}
    (tmp_path / "README.md").write_text(text)
    assert base_matter(tmp_path) == {}
