# SPDX-License-Identifier: Apache-2.0
"""Files that belong together are known to: every flipped bit and every mixture is seen."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import MakeDense, finish_of, linears, tensors_of
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from nm_permute_plugin.checkpoint import checksums
from nm_permute_plugin.checkpoint.directory import INDEX, SINGLE, open_checkpoint
from nm_permute_plugin.checkpoint.plan import TWO_FOUR
from nm_permute_plugin.checkpoint.saving import save_checkpoint
from nm_permute_plugin.checkpoint.shards import DamagedError
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.evaluation.pretrained import load_checkpoint
from nm_permute_plugin.maths.masks import nm_mask

FORMATS = ["dense", "sparse-24-bitmask", "sparse-bitmask"]
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, tiny_model) -> Save:
    """A factory: the folder of a tiny 2:4 model as a run saves it, in several files."""

    def make(form: str, seed: int = 0, shard: str = "20KB") -> Path:
        model = tiny_model("llama", seed=seed)
        for name in linears(model):
            weight = model.get_submodule(name).weight.data
            weight.masked_fill_(~nm_mask(weight.abs(), TWO_FOUR), 0)
        out = tmp_path / f"{form}-{seed}"
        save_checkpoint(model, out, finish_of(model, form), max_shard_size=shard)
        return out

    return make


def written(path: Path) -> list[str]:
    """The files that have checksums, and that which holds them."""
    files = json.loads((path / checksums.FILE).read_text())["files"]
    return [*files, checksums.FILE]


@pytest.mark.parametrize("form", FORMATS)
def test_every_file_of_a_run_has_a_checksum(save: Save, form: str) -> None:
    path = save(form)
    weights = {file.name for file in path.glob("*.safetensors")}
    assert len(weights) > 1
    record = {
        f"nm_permute/{name}" for name in ("report.json", "permutations.safetensors")
    }
    expected = weights | record | {"config.json", INDEX, checksums.FILE}
    assert set(written(path)) == expected
    report = verify(path)
    assert report.faults == ()
    assert report.checksums


@pytest.mark.parametrize("form", FORMATS)
def test_every_flipped_bit_is_seen(save: Save, form: str) -> None:
    """60 flips anywhere: 30 in weights, 10 in their headers, 20 in all other files."""
    path, draw = save(form), random.Random(20261126)
    shards = sorted(path.glob("*.safetensors"))
    others = [path / name for name in written(path) if path / name not in shards]
    for number in range(60):
        file = draw.choice(shards if number < 40 else others)
        content = bytearray(file.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        low, high = 0, len(content)
        if number < 40:
            low, high = (header, high) if number < 30 else (0, header)
        at, bit = draw.randrange(low, high), draw.randrange(8)
        content[at] ^= 1 << bit
        whole = file.read_bytes()
        file.write_bytes(content)
        report = verify(path)
        file.write_bytes(whole)
        assert not report.good, (number, file, at, bit)
    assert verify(path).good


@pytest.mark.parametrize("form", FORMATS)
def test_half_an_upload_is_seen(save: Save, form: str) -> None:
    path, other = save(form), save(form, seed=1)
    name = sorted(file.name for file in path.glob("*.safetensors"))[1]
    shutil.copy(other / name, path / name)
    report = verify(path)
    assert name in {fault.file for fault in report.faults}
    with pytest.raises(DamagedError, match=name):
        convert(path, path.parent / "converted", "dense")
    with pytest.raises(DamagedError, match=name):
        load_checkpoint(path, "cpu")
    if form != "dense":  # transformers reads a dense checkpoint without us
        (path / checksums.FILE).unlink()
        with pytest.raises(DamagedError, match=rf"{name}: was not written together"):
            AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("name", ["config.json", "nm_permute/report.json"])
def test_config_and_record_of_another_run_are_seen(save: Save, name: str) -> None:
    path, other = save("sparse-24-bitmask"), save("sparse-24-bitmask", seed=1)
    text = (other / name).read_text()
    (path / name).write_text(text.replace("\n", " \n", 1))
    (fault,) = verify(path).faults
    assert (fault.file, fault.tensor) == (name, "")
    assert "of another run" in fault.message
    (path / name).unlink()
    messages = [f.message for f in verify(path).faults if f.file == name]
    assert len(messages) == 1
    assert "is missing" in messages[0] or "cannot be read" in messages[0]


def test_cards_and_other_files_change_nothing(save: Save) -> None:
    path = save("dense")
    (path / "README.md").write_text("# Mine\n")
    (path / "tokenizer.json").write_text("{}")
    (path / "nm_permute" / "notes.txt").write_text("mine")
    assert verify(path).good


@pytest.mark.parametrize("form", FORMATS)
def test_what_transformers_saves_again_is_an_ordinary_checkpoint(
    save: Save, form: str
) -> None:
    path = save(form)
    again = path.parent / "again"
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(again)
    report = verify(again)
    assert report.good
    assert not report.checksums


@pytest.mark.parametrize("place", ["in place", "elsewhere"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_conversion_has_checksums_of_its_own_and_keeps_the_record(
    save: Save, form: str, place: str
) -> None:
    path = save("auto")
    target = path if place == "in place" else path.parent / "converted"
    convert(path, target, form)
    report = verify(target)
    assert report.faults == ()
    assert report.checksums
    assert sum(row.promised for row in report.rows) == 14
    assert (target / "nm_permute" / "permutations.safetensors").exists()


def test_a_folder_without_checksums_is_read_as_ever(save: Save) -> None:
    path = save("dense")
    (path / checksums.FILE).unlink()
    report = verify(path)
    assert report.good
    assert not report.checksums
    checksums.refuse_changed(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "must hold an object"),
        ('{"algorithm": "crc"}', "holds no checksums: its algorithm is 'crc'"),
        ('{"algorithm": "sha256", "files": {}}', "holds no checksums"),
        ('{"algorithm": "sha256", "files": {"../x": "0"}}', "not in this folder"),
        ('{"algorithm": "sha256", "files": {"/etc/x": "0"}}', "not in this folder"),
    ],
)
def test_checksums_that_are_none(save: Save, text: str, message: str) -> None:
    path = save("dense", shard="1GB")
    (path / checksums.FILE).write_text(text)
    (fault,) = verify(path).faults
    assert fault.file == checksums.FILE
    assert message in fault.message


def test_a_file_that_another_tool_wrote_is_no_part_of_ours(
    make_dense: MakeDense,
) -> None:
    dense = make_dense()
    sparse = dense.parent / "sparse"
    convert(dense, sparse, "sparse-24-bitmask")
    file = sorted(sparse.glob("*.safetensors"))[1]
    tensors = tensors_of(sparse)
    held = open_checkpoint(sparse).where
    save_file({n: tensors[n] for n in held if held[n].path == file}, file)
    with pytest.raises(DamagedError, match=f"{file.name}: was not written together"):
        open_checkpoint(sparse)
    assert file.name in {fault.file for fault in verify(sparse).faults}


def test_one_file_needs_no_other(make_dense: MakeDense) -> None:
    dense = make_dense(shard="1GB")
    convert(dense, dense, "sparse-24-bitmask")
    assert written(dense) == [SINGLE, "config.json", checksums.FILE]
    assert verify(dense).good
