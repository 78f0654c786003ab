# SPDX-License-Identifier: Apache-2.0
"""A model is saved whole or not at all, without llm-compressor as with it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint_files import finish_of, linears
from safetensors.torch import load_file
from transformers import PreTrainedModel

from nm_permute_plugin.checkpoint import directory, transaction
from nm_permute_plugin.checkpoint.plan import TWO_FOUR
from nm_permute_plugin.checkpoint.saving import save_checkpoint
from nm_permute_plugin.checkpoint.shards import Shard
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.maths.masks import nm_mask


@pytest.fixture
def model(tiny_model) -> PreTrainedModel:
    """A tiny model whose linears are 2:4, the head aside."""
    made = tiny_model("llama")
    for name in linears(made):
        weight = made.get_submodule(name).weight.data
        weight.masked_fill_(~nm_mask(weight.abs().float(), TWO_FOUR), 0)
    return made


def content_of(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The path of every checkpoint that is opened, by whatever room opens it."""
    paths: list[Path] = []
    real = directory.open_checkpoint

    def counted(path: Path) -> directory.Checkpoint:
        paths.append(path)
        return real(path)

    for name, module in list(sys.modules.items()):
        if name.startswith("nm_permute_plugin.") and hasattr(module, "open_checkpoint"):
            monkeypatch.setattr(module, "open_checkpoint", counted)
    return paths


@pytest.mark.parametrize(("asked", "most"), [("auto", 2), ("dense", 1)])
def test_a_save_opens_its_checkpoint_once_and_once_more_if_it_converts(
    model: PreTrainedModel, tmp_path: Path, opened: list[Path], asked: str, most: int
) -> None:
    save_checkpoint(model, tmp_path / "out", finish_of(model, asked))
    assert 1 <= len(opened) <= most


def test_a_save_reads_a_matrix_to_check_it_and_to_write_it(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = Shard.read
    monkeypatch.setattr(
        Shard, "read", lambda s, name: read.append(name) or real(s, name)
    )
    save_checkpoint(model, tmp_path / "out", finish_of(model))
    assert {read.count(f"{name}.weight") for name in linears(model)} == {2}


@pytest.mark.parametrize("asked", ["auto", "dense"])
def test_what_is_saved_is_finished_and_other_files_stay(
    model: PreTrainedModel, tmp_path: Path, asked: str
) -> None:
    out = tmp_path / "out"
    (out / "more").mkdir(parents=True)
    (out / "more" / "notes.txt").write_text("mine")
    (out / "README.md").write_text("# Mine\n")
    (out / "model-00001-of-00002.safetensors").write_text("stale")
    save_checkpoint(model, out, finish_of(model, asked), max_shard_size="20KB")
    assert verify(out).good
    stored = {row.format for row in verify(out).rows if row.promised}
    assert stored == {"sparse-24-bitmask" if asked == "auto" else "dense"}
    assert (out / "more" / "notes.txt").read_text() == "mine"
    assert (out / "README.old.md").read_text() == "# Mine\n"
    assert b"stale" not in content_of(out).values()
    save_checkpoint(model, out, finish_of(model, asked))
    assert [file.name for file in out.glob("model*")] == ["model.safetensors"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_of_two_saves_into_one_folder_both_results_stay(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def meanwhile(fresh: Path) -> None:
        finish_of(model, "dense")(fresh)
        save_checkpoint(model, out, finish_of(model))

    with pytest.raises(FileExistsError, match="what was made here is in .*out-2"):
        save_checkpoint(model, out, meanwhile)
    for folder, form in ((out, "sparse-24-bitmask"), (tmp_path / "out-2", "dense")):
        report = verify(folder)
        assert report.good
        assert {row.format for row in report.rows if row.promised} == {form}


@pytest.mark.parametrize("old", [True, False], ids=["over an older one", "new"])
def test_a_checkpoint_that_is_refused_leaves_no_trace(
    model: PreTrainedModel, tmp_path: Path, old: bool
) -> None:
    out, finish = tmp_path / "out", finish_of(model)
    if old:
        save_checkpoint(model, out, finish)
    before = content_of(tmp_path)
    model.get_submodule(linears(model)[3]).weight.data.fill_(1)
    with pytest.raises(ValueError, match="is not 2:4 any more: row 0, channels 0"):
        save_checkpoint(model, out, finish)
    assert content_of(tmp_path) == before
    assert out.exists() == old


def test_the_old_config_is_never_gone_beside_the_old_weights(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between any two steps, the folder holds a whole checkpoint, or is away."""
    out = tmp_path / "out"
    save_checkpoint(model, out, finish_of(model))
    before, seen = content_of(out), []

    def watched(step: Callable[..., None]) -> Callable[..., None]:
        def look_first(*args: object, **options: object) -> None:
            if out.exists():
                seen.append(content_of(out))
            step(*args, **options)

        return look_first

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink"):
            patch.setattr(os, name, watched(getattr(os, name)))
        model.config.rope_theta = 7.0
        save_checkpoint(model, out, finish_of(model, "dense"))
    assert len(seen) > 1
    assert all(content in (before, content_of(out)) for content in seen)


def test_a_save_inside_of_a_transaction_makes_no_folder_of_its_own(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    folders = set()

    def look(folder: Path) -> None:
        folders.update(p.relative_to(tmp_path) for p in tmp_path.rglob("*.unfinished"))

    with transaction.directory(tmp_path / "out") as unfinished:
        save_checkpoint(model, unfinished, look)
        assert folders == {unfinished.relative_to(tmp_path)}
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_saving_needs_no_llm_compressor() -> None:
    script = (
        "import sys, json\n"
        "from nm_permute_plugin.checkpoint import finish, saved_names, saving\n"
        "hosts = 'llmcompressor', 'compressed_tensors', 'transformers'\n"
        "print(json.dumps([name for name in hosts if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert json.loads(done.stdout) == [], done.stderr
