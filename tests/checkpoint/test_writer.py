# SPDX-License-Identifier: Apache-2.0
"""Conversion there and back is lossless, and what fails leaves the old files whole."""

import errno
import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    KINDS,
    MakeDense,
    assert_same_tensors,
    tensors_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nm_permute_plugin.checkpoint import checksums, writer
from nm_permute_plugin.checkpoint.config import read_sparsity_config
from nm_permute_plugin.checkpoint.directory import INDEX, SINGLE
from nm_permute_plugin.checkpoint.shard_writer import ShardWriter
from nm_permute_plugin.checkpoint.shards import CHECKSUMS, open_shard
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.maths.pattern import NMPattern

DOWN = "model.layers.0.mlp.down_proj"
FORMATS = ["sparse-24-bitmask", "sparse-bitmask"]


def config_of(path: Path) -> dict:
    """The parsed ``config.json``."""
    return json.loads((path / "config.json").read_text())


def content_of(path: Path) -> dict[str, bytes]:
    """Every file of a directory, to see that nothing changed."""
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shard", ["20KB", "1GB"], ids=["shards", "one file"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_changes_no_bit(
    tmp_path: Path, make_dense: MakeDense, kind: str, shard: str, form: str
) -> None:
    dense = make_dense(kind, shard)
    done = convert(dense, tmp_path / "sparse", form)
    assert len(done.compressed) == 14
    assert set(done.dense) == {"lm_head", "model.embed_tokens"}
    stored = tensors_of(tmp_path / "sparse")
    assert f"{DOWN}.weight" not in stored
    assert (
        stored[f"{DOWN}.compressed"].dtype == tensors_of(dense)[f"{DOWN}.weight"].dtype
    )
    back = convert(tmp_path / "sparse", tmp_path / "back", "dense")
    assert back.compressed == ()
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(dense))
    assert config_of(tmp_path / "back") == config_of(dense)


@pytest.mark.parametrize("origin", FORMATS)
@pytest.mark.parametrize("form", [*FORMATS, "dense"])
def test_every_format_becomes_every_other(
    tmp_path: Path, make_dense: MakeDense, origin: str, form: str
) -> None:
    dense = make_dense()
    convert(dense, tmp_path / "direct", form)
    convert(dense, tmp_path / "origin", origin)
    convert(tmp_path / "origin", tmp_path / "target", form)
    assert_same_tensors(
        tensors_of(tmp_path / "target"), tensors_of(tmp_path / "direct")
    )
    assert config_of(tmp_path / "target") == config_of(tmp_path / "direct")


def test_the_index_and_the_metadata_are_kept(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    dense = make_dense()
    convert(dense, tmp_path / "sparse", "sparse-24-bitmask")
    files = sorted(file.name for file in dense.glob("*.safetensors"))
    assert len(files) > 1
    assert files == sorted(f.name for f in (tmp_path / "sparse").glob("*.safetensors"))
    index = json.loads((tmp_path / "sparse" / INDEX).read_text())
    old = json.loads((dense / INDEX).read_text())
    found, size = {}, 0
    for file in files:
        with safe_open(tmp_path / "sparse" / file, "pt") as shard:
            assert shard.metadata()["format"] == "pt"
            found |= dict.fromkeys(shard.keys(), file)
            size += sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
    assert index["weight_map"] == found
    assert index["metadata"] == {**old["metadata"], "total_size": size}


def test_the_config_names_the_modules_where_another_linear_is_dense(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    all_sparse, one_dense = make_dense(), tmp_path / "one"
    done = convert(all_sparse, tmp_path / "all", "sparse-24-bitmask")
    config = read_sparsity_config(config_of(tmp_path / "all"))
    assert (config.targets, config.ignore) == (("Linear",), ("lm_head",))
    assert config.global_sparsity == done.global_sparsity > 0.3
    named = [name for name in done.compressed if name != DOWN]
    done = convert(all_sparse, one_dense, "sparse-24-bitmask", modules=named)
    config = read_sparsity_config(config_of(one_dense))
    assert set(config.targets) == set(named) == set(done.compressed)
    assert done.dense[DOWN] == "not asked for"


def test_a_module_that_is_not_2_4_stays_dense_or_is_refused(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    dense = make_dense(keep_dense=("lm_head", DOWN))
    done = convert(dense, tmp_path / "free", "sparse-24-bitmask")
    assert done.dense[DOWN].startswith("not 2:4: row 0, channels 0..3 hold 4")
    assert DOWN not in read_sparsity_config(config_of(tmp_path / "free")).targets
    with pytest.raises(
        ValueError, match=rf"model-.*: {DOWN}.weight .* row 0, channels"
    ):
        convert(dense, tmp_path / "asked", "sparse-24-bitmask", modules=[DOWN])
    assert not (tmp_path / "asked").exists()


def test_other_patterns_take_the_general_format(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    pattern = NMPattern(4, 8)
    dense = make_dense(pattern=pattern, intermediate_size=48)
    done = convert(dense, tmp_path / "sparse", "sparse-bitmask", pattern=pattern)
    assert len(done.compressed) == 14
    assert (
        config_of(tmp_path / "sparse")["quantization_config"]["sparsity_config"][
            "sparsity_structure"
        ]
        == "4:8"
    )
    convert(tmp_path / "sparse", tmp_path / "back", "dense")
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(dense))
    with pytest.raises(ValueError, match="stores 2:4 and not 4:8"):
        convert(dense, tmp_path / "no", "sparse-24-bitmask", pattern=pattern)


def test_packed_quantizations_stay_as_they_are(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    dense = make_dense(shard="1GB")
    tensors = load_file(dense / SINGLE)
    tensors[f"{DOWN}.weight_packed"] = tensors.pop(f"{DOWN}.weight").view(torch.int32)
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    config = config_of(dense) | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {},
        }
    }
    (dense / "config.json").write_text(json.dumps(config))
    done = convert(dense, tmp_path / "to", "sparse-24-bitmask", modules=[DOWN])
    assert done.compressed == ()
    assert "pack-quantized stays as it is" in done.dense[DOWN]
    assert_same_tensors(tensors_of(tmp_path / "to"), tensors)
    assert config_of(tmp_path / "to") == config


def test_negative_zeros_are_named_and_can_be_cleared(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    dense = make_dense(shard="1GB")
    tensors = load_file(dense / SINGLE)
    weight = tensors[f"{DOWN}.weight"]
    weight[weight == 0] = -0.0
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"{DOWN} and 0 other .* but for -0.0.*clear_zeros=True"
    ):
        convert(dense, tmp_path / "a", "sparse-24-bitmask")
    assert not (tmp_path / "a").exists()
    done = convert(dense, tmp_path / "b", "sparse-24-bitmask", clear_zeros=True)
    assert DOWN in done.compressed


def test_a_checkpoint_is_converted_where_it_is(make_dense: MakeDense) -> None:
    dense = make_dense()
    (dense / "tokenizer.json").write_text("{}")
    (dense / "more").mkdir()
    (dense / "more" / "file").write_text("x")
    before = tensors_of(dense)
    convert(dense, dense, "sparse-24-bitmask")
    sparse = tensors_of(dense)
    assert f"{DOWN}.compressed" in sparse
    sizes = [sum(t.nbytes for t in held.values()) for held in (sparse, before)]
    assert sizes[0] < 0.7 * sizes[1]
    convert(dense, dense, "dense")
    assert_same_tensors(tensors_of(dense), before)
    assert (dense / "more" / "file").read_text() == "x"
    assert (dense / "tokenizer.json").exists()
    assert [entry.name for entry in dense.parent.iterdir()] == [dense.name]


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "elsewhere"])
def test_a_full_disk_leaves_the_old_output_whole(
    tmp_path: Path,
    make_dense: MakeDense,
    monkeypatch: pytest.MonkeyPatch,
    in_place: bool,
) -> None:
    dense = make_dense()
    target = dense if in_place else tmp_path / "target"
    convert(dense, target, "dense")
    before, written = content_of(target), []
    put = ShardWriter._put

    def full(self: ShardWriter, content: bytes, at: int, name: str) -> None:
        written.append(name)
        if len(written) < 20:
            return put(self, content, at, name)
        self._file.close()
        self._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        return put(self, content, at, name)

    monkeypatch.setattr(ShardWriter, "_put", full)
    with pytest.raises(OSError, match=r"could not be written to model-") as caught:
        convert(dense, target, "sparse-24-bitmask", overwrite=True)
    assert caught.value.errno in (errno.ENOSPC, errno.ESPIPE)
    assert content_of(target) == before
    assert {entry.name for entry in tmp_path.iterdir()} <= {dense.name, target.name}


def test_a_swap_that_fails_puts_the_old_output_back(
    tmp_path: Path, make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_dense()
    before = content_of(dense)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".unfinished":
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="broken"):
        convert(dense, dense, "sparse-24-bitmask")
    assert content_of(dense) == before
    assert [entry.name for entry in tmp_path.iterdir()] == [dense.name]


def test_a_target_that_holds_something_is_not_overwritten(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    dense, target = make_dense(), tmp_path / "target"
    target.mkdir()
    convert(dense, target, "dense")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        convert(dense, target, "dense")
    convert(dense, target, "sparse-24-bitmask", overwrite=True)
    assert f"{DOWN}.compressed" in tensors_of(target)
    with pytest.raises(ValueError, match="write somewhere else"):
        convert(dense, tmp_path, "dense", overwrite=True)
    assert dense.exists()


def test_only_one_matrix_at_a_time_is_held(
    tmp_path: Path, make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is made again for every shard: each matrix is encoded once."""
    encoded = []
    encode = writer._encode
    monkeypatch.setattr(
        writer, "_encode", lambda plan, m, w: encoded.append(m) or encode(plan, m, w)
    )
    done = convert(make_dense(), tmp_path / "sparse", "sparse-24-bitmask")
    assert sorted(encoded) == sorted(done.compressed)


def test_parts_in_different_shards_are_put_together(
    tmp_path: Path, make_dense: MakeDense
) -> None:
    dense, moved = make_dense(), tmp_path / "moved"
    convert(dense, moved, "sparse-24-bitmask")
    index = json.loads((moved / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    everything = tensors_of(moved)
    for number, (name, _) in enumerate(sorted(everything.items())):
        index["weight_map"][name] = names[number % len(names)]
    for file in names:
        held = {n: t for n, t in everything.items() if index["weight_map"][n] == file}
        save_file(held, moved / file, {"format": "pt"})
    (moved / INDEX).write_text(json.dumps(index))
    (moved / checksums.FILE).unlink()  # another tool has moved the tensors
    convert(moved, tmp_path / "back", "dense")
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(dense))


def test_the_safetensors_package_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.int64).view(2, 3),
        "b": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(2.5, dtype=torch.bfloat16),
        "e": torch.tensor([True, False]),
    }
    announced = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with ShardWriter(tmp_path / "x", announced, {"format": "pt", "more": "ü"}) as out:
        for name, tensor in reversed(tensors.items()):
            out.write(name, tensor)
    assert_same_tensors(load_file(tmp_path / "x"), tensors)
    shard = open_shard(tmp_path / "x")
    assert_same_tensors({name: shard.read(name) for name in tensors}, tensors)
    shard.check()
    assert shard.metadata["more"] == "ü"
    assert CHECKSUMS in shard.metadata


def test_a_file_is_complete_or_an_error(tmp_path: Path) -> None:
    announced = {"a": (torch.int8, (2,)), "b": (torch.int8, (2,))}
    with (
        pytest.raises(ValueError, match=r"never written: \['b'\]"),
        ShardWriter(tmp_path / "x", announced, {}) as out,
    ):
        out.write("a", torch.zeros(2, dtype=torch.int8))
    with (
        pytest.raises(ValueError, match="a was announced as torch.int8"),
        ShardWriter(tmp_path / "y", announced, {}) as out,
    ):
        out.write("a", torch.zeros(3, dtype=torch.int8))
