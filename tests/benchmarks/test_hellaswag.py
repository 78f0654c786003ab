# SPDX-License-Identifier: Apache-2.0
"""HellaSwag of a local file: read, and answered item by item as lm-eval does."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import begin_texts_with

from hellaswag import answer
from nm_permute_plugin.evaluation.harness import read_options, run_tasks
from nm_permute_plugin.evaluation.pretrained import load_checkpoint, tokenizer_of
from tasks.hellaswag_file import Item, load, read_items

TASKS = Path(__file__).parents[2] / "benchmarks" / "tasks"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, chain_rows, words) -> Path:
    """Twenty-four items whose endings differ in length, as people write them."""
    generator = torch.Generator().manual_seed(3)
    lines: list[str] = []
    for row in chain_rows(24, 8, seed=12):
        ids = torch.randint(48, (18,), generator=generator)
        label = int(ids[0]) % 4
        endings = [words(part) for part in ids.split((3, 5, 4, 6))]
        lines += [f"w{10 + len(lines) // 6}: {words(row)}", str(label), *endings]
    lines[3] = f"{lines[3]} [step] w05"
    path = tmp_path_factory.mktemp("hellaswag") / "validation.raw"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("begin", [None, "w03"], ids=["plain", "bos"])
def test_answers_are_lm_evals_item_by_item(
    trained_checkpoint: Path, file: Path, tmp_path: Path, begin: str | None
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained_checkpoint, folder)
    if begin is not None:
        begin_texts_with(folder, begin)
    words = ["--include_path", TASKS, "--tasks", "hellaswag_file", "--batch_size", "7"]
    words += ["--metadata", f"file={file}"]
    options = read_options([str(word) for word in words])
    samples = run_tasks(folder, options, "cpu")["samples"]["hellaswag_file"]
    model, tokenizer = load_checkpoint(folder, "cpu"), tokenizer_of(folder)
    for batch_size in (1, 10, 128):
        ours = answer(model, tokenizer, read_items(file), batch_size)
        assert ours.acc == [bool(sample["acc"]) for sample in samples]
        assert ours.acc_norm == [bool(sample["acc_norm"]) for sample in samples]
    assert ours.acc != ours.acc_norm
    assert 0 < sum(ours.acc) < len(ours.acc)


def test_items_are_read_as_the_original_prepares_them(tmp_path: Path) -> None:
    path = tmp_path / "one.raw"
    lines = [
        "Canoeing: Two women sit. the man in Rome",
        "2",
        "a [title] b",
        "c",
        "d",
        " e ",
    ]
    path.write_text("\n".join(lines) + "\n")
    item = Item("Canoeing: Two women sit. The man in rome", ["a. b", "c", "d", "e"], 2)
    assert read_items(path) == [item]


def test_files_of_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "other.raw"
    path.write_text("a\n1\nb\nc\nd\n")
    with pytest.raises(ValueError, match=r"other\.raw has 5 lines, and an item has 6"):
        read_items(path)
    path.write_text("a\n1\nb\nc\nd\ne\na\nb\nb\nc\nd\ne\n")
    with pytest.raises(
        ValueError, match=r"other\.raw line 8 is 'b', but must be the num"
    ):
        load(str(path))
    with pytest.raises(FileNotFoundError, match=r"none\.raw does not exist"):
        read_items(tmp_path / "none.raw")
    monkeypatch.delenv("HELLASWAG_FILE", raising=False)
    with pytest.raises(
        ValueError, match=r"give --metadata file=PATH, or set HELLASWAG_F"
    ):
        load()
    monkeypatch.setenv("HELLASWAG_FILE", str(tmp_path / "none.raw"))
    with pytest.raises(FileNotFoundError, match=r"none\.raw"):
        load()
