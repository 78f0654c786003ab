# SPDX-License-Identifier: Apache-2.0
"""A good checkpoint passes; each planted fault is found, by file and tensor."""

import json
import random
from pathlib import Path

import pytest
import torch
from checkpoint_files import KINDS, MakeDense, Tensors, assert_same_bits, tensors_of
from safetensors.torch import load_file, save_file

from nm_permute_plugin.checkpoint import checksums
from nm_permute_plugin.checkpoint.directory import INDEX, SINGLE, open_checkpoint
from nm_permute_plugin.checkpoint.verify import Fault, verify
from nm_permute_plugin.checkpoint.writer import convert

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def make_sparse(tmp_path: Path, make_dense: MakeDense) -> MakeDense:
    """
    A factory like ``make_dense``, of checkpoints that are stored sparse.

    The checksums of whole files are gone, so that each check has to find its own fault.
    """

    def make(kind: str = "bf16", shard: str = "1GB", **options: object) -> Path:
        dense, path = make_dense(kind, shard, **options), tmp_path / f"sparse-{kind}"
        convert(dense, path, "sparse-24-bitmask")
        (path / checksums.FILE).unlink()
        return path

    return make


def rewrite(path: Path, **changes: object) -> None:
    """Change tensors of a single file; without checksums, as other tools write it."""
    tensors: Tensors = load_file(path / SINGLE)
    for name, change in changes.items():
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]) if callable(change) else change
    save_file(tensors, path / SINGLE, {"format": "pt"})


def assert_fault(path: Path, file: str, tensor: str, message: str) -> Fault:
    """Exactly one fault is found, with this file, tensor and message."""
    report = verify(path)
    assert not report.good
    assert len(report.faults) == 1, report.faults
    fault = report.faults[0]
    assert (fault.file, fault.tensor) == (file, tensor)
    assert message in fault.message
    return fault


@pytest.mark.parametrize("form", ["dense", "sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("shard", ["20KB", "1GB"], ids=["shards", "one file"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_good_checkpoint_passes(
    tmp_path: Path, make_dense: MakeDense, kind: str, shard: str, form: str
) -> None:
    path = tmp_path / "target"
    done = convert(make_dense(kind, shard), path, form)
    report = verify(path)
    assert report.good, report.faults
    rows = {row.module: row for row in report.rows}
    assert {name for name, row in rows.items() if row.promised} == set(done.compressed)
    assert rows[DOWN].sparse
    assert rows[DOWN].zeros >= 0.5
    assert rows[DOWN].shape == (32, 52)
    assert not rows["lm_head"].sparse


def test_a_dense_checkpoint_is_held_to_what_the_caller_promises(
    make_dense: MakeDense,
) -> None:
    dense = make_dense(shard="1GB")
    assert verify(dense, modules=[DOWN]).good
    report = verify(dense, modules=[DOWN, "lm_head", "nowhere"])
    assert [fault.tensor for fault in report.faults] == ["nowhere", "lm_head"]
    assert "not 2:4: row 0" in report.faults[1].message


def three_bits(bitmask: torch.Tensor) -> torch.Tensor:
    """A bitmask with a bit too many in row 2, channels 4 to 7."""
    bitmask[2, 0] = 0x73
    return bitmask


def test_three_bits_in_a_group(make_sparse: MakeDense) -> None:
    path = make_sparse()
    rewrite(path, **{f"{DOWN}.bitmask": three_bits})
    assert_fault(
        path, SINGLE, DOWN, "row 2 of the bitmask has 3 bits for channels 4..7"
    )


def test_a_shape_that_disagrees(make_sparse: MakeDense) -> None:
    path = make_sparse()
    rewrite(path, **{f"{DOWN}.shape": torch.tensor([[32], [56]])})
    assert_fault(path, SINGLE, DOWN, "shape says [32, 56]")


def test_a_wrong_dtype(make_sparse: MakeDense) -> None:
    path = make_sparse()
    rewrite(path, **{f"{DOWN}.bitmask": lambda t: t.to(torch.int32)})
    assert_fault(path, SINGLE, DOWN, "bitmask torch.int32")


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "NaN"), (float("inf"), "infinity"), (-1.0, "not positive")],
)
def test_scales_that_are_none(
    make_sparse: MakeDense, kind: str, value: float, message: str
) -> None:
    path, scale = make_sparse(kind), f"{DOWN}.weight_scale"
    rewrite(path, **{scale: lambda t: t.index_fill(0, torch.tensor(3), value)})
    assert_fault(path, SINGLE, scale, message)


def test_scales_that_are_missing_or_too_few(make_sparse: MakeDense) -> None:
    path, scale = make_sparse("fp8"), f"{DOWN}.weight_scale"
    rewrite(path, **{scale: lambda t: t[:5].clone()})
    assert_fault(path, SINGLE, DOWN, f"{scale} [5, 1]")
    rewrite(path, **{scale: None})
    assert_fault(path, SINGLE, DOWN, f"there is no {scale}")


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [({"group_size": 4}, (32, 13)), ({"block_structure": [8, 16]}, (4, 4))],
    ids=["groups", "blocks"],
)
def test_scales_of_groups_and_of_blocks(
    make_sparse: MakeDense, scheme: dict, shape: tuple[int, int]
) -> None:
    """What the config says of them is right, and nothing else is."""
    path, scale = make_sparse("int8"), f"{DOWN}.weight_scale"
    rewrite(path, **{scale: torch.ones(shape)})
    assert_fault(path, SINGLE, DOWN, f"{scale} {list(shape)}")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= scheme
    (path / "config.json").write_text(json.dumps(config))
    assert verify(path).good


@pytest.mark.parametrize("part", ["compressed", "bitmask", "shape"])
def test_a_part_that_is_missing(make_sparse: MakeDense, part: str) -> None:
    path = make_sparse()
    rewrite(path, **{f"{DOWN}.{part}": None})
    assert_fault(path, SINGLE, f"{DOWN}.{part}", f"no {DOWN}.{part}")


def test_a_weight_beside_its_stored_form(make_sparse: MakeDense) -> None:
    path = make_sparse()
    rewrite(path, **{f"{DOWN}.weight": torch.zeros(32, 52)})
    assert f"{DOWN}.weight beside it" in verify(path).faults[0].message


def test_weights_that_are_not_finite(make_sparse: MakeDense) -> None:
    path = make_sparse()
    rewrite(
        path,
        **{
            f"{DOWN}.compressed": lambda t: t.index_fill(0, torch.tensor(1), torch.nan),
            "model.norm.weight": lambda t: t * torch.inf,
        },
    )
    found = {fault.tensor: fault.message for fault in verify(path).faults}
    assert found.keys() == {DOWN, "model.norm.weight"}


def test_an_unknown_format(make_sparse: MakeDense) -> None:
    path = make_sparse()
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace("sparse-24-bitmask", "sparse-25"))
    assert_fault(path, "config.json", "sparsity_config", "'sparse-25'")


def test_a_promise_that_is_not_kept(make_sparse: MakeDense) -> None:
    path = make_sparse()
    config = json.loads((path / "config.json").read_text())
    block = config["quantization_config"]["sparsity_config"]
    block["targets"], block["ignore"] = [f"{DOWN}", "model.layers.9.mlp.up_proj"], []
    (path / "config.json").write_text(json.dumps(config))
    report = verify(path)
    named = [f for f in report.faults if f.file == "config.json"]
    assert [fault.tensor for fault in named] == ["model.layers.9.mlp.up_proj"]
    rest = [fault for fault in report.faults if fault not in named]
    assert len(rest) == 13
    assert all("does not say that it is sparse" in fault.message for fault in rest)


def test_a_checkpoint_without_its_block(make_sparse: MakeDense) -> None:
    path = make_sparse()
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    assert {f.message[:12] for f in verify(path).faults} == {"says nothing"}
    assert len(verify(path).faults) == 1


def test_pruned_along_the_wrong_axis(make_sparse: MakeDense) -> None:
    path = make_sparse()
    weight = torch.randn(32, 52).view(8, 4, 52)
    weight[:, 2:] = 0
    parts = dict.fromkeys([f"{DOWN}.{p}" for p in ("compressed", "bitmask", "shape")])
    rewrite(path, **parts)
    tensors = load_file(path / SINGLE) | {f"{DOWN}.weight": weight.view(32, 52)}
    save_file(tensors, path / SINGLE, {"format": "pt"})
    messages = [fault.message for fault in verify(path).faults]
    assert any("along the other axis" in message for message in messages)


def test_negative_zeros_in_pruned_places(make_dense: MakeDense) -> None:
    dense = make_dense("fp8", "1GB")
    name = f"{DOWN}.weight"
    words = load_file(dense / SINGLE)[name].view(torch.int8)
    weight = words.masked_fill(words == 0, -128).view(torch.float8_e4m3fn)
    rewrite(dense, **{name: weight})
    report = verify(dense, modules=[DOWN])
    assert "some of them -0.0" in report.faults[0].message


@pytest.mark.parametrize("length", [0, 7, 100, -1], ids=str)
def test_a_truncated_shard(make_sparse: MakeDense, length: int) -> None:
    path = make_sparse(shard="20KB")
    file = sorted(path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:length])
    fault = verify(path).faults[0]
    assert fault.file == file.name
    assert "cut off" in fault.message


def test_a_missing_shard(make_sparse: MakeDense) -> None:
    path = make_sparse(shard="20KB")
    file = sorted(path.glob("*.safetensors"))[1]
    file.unlink()
    assert_fault(
        path, file.name, "", "does not exist, and model.safetensors.index.json names it"
    )


@pytest.mark.parametrize("change", ["drop", "add", "move"])
def test_an_index_that_does_not_fit(make_sparse: MakeDense, change: str) -> None:
    path, name = make_sparse(shard="20KB"), f"{DOWN}.bitmask"
    index = json.loads((path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    if change == "drop":
        del index["weight_map"][name]
    elif change == "add":
        name = "model.layers.7.weight"
        index["weight_map"][name] = files[0]
    else:
        index["weight_map"][name] = files[index["weight_map"][name] == files[0]]
    (path / INDEX).write_text(json.dumps(index))
    assert_fault(path, INDEX, name, name)


@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_a_missing_file(make_sparse: MakeDense, name: str) -> None:
    path = make_sparse()
    (path / name).unlink()
    assert "cannot be read" in verify(path).faults[0].message


def test_a_changed_byte_is_found_by_its_checksum(make_sparse: MakeDense) -> None:
    path = make_sparse()
    content = bytearray((path / SINGLE).read_bytes())
    content[-1] ^= 1
    (path / SINGLE).write_bytes(content)
    faults = verify(path).faults
    assert len(faults) == 1
    assert "CRC-32" in faults[0].message


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One small accident: bytes changed, lost, doubled, or swapped."""
    changed = bytearray(content)
    at = draw.randrange(len(changed))
    # headers are a small part of a file and the more interesting one
    if draw.random() < 0.5:
        at = draw.randrange(min(len(changed), 4000))
    length = draw.choice([1, 1, 2, 8, 64])
    kind = draw.randrange(5)
    if kind == 0:
        changed[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        changed[at : at + length] = draw.randbytes(len(changed[at : at + length]))
    elif kind == 2:
        del changed[at : at + length]
    elif kind == 3:
        changed[at:at] = changed[at : at + length]
    else:
        other = draw.randrange(len(changed) - length)
        piece = bytes(changed[other : other + length])
        changed[at : at + length] = piece[: len(changed[at : at + length])]
    return bytes(changed)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_no_mutation_is_read_as_other_weights(
    make_sparse: MakeDense, make_dense: MakeDense, kind: str
) -> None:
    """
    500 accidents for each of two kinds: refused, or every tensor is what it was.

    The weights themselves have no redundancy, nor has a bitmask byte: 36 of its 256
    values are good ones. It is the checksums that make this hold, for every change that
    CRC-32 sees. Changes of what config.json says outside its sparsity block are not
    covered: nothing in a checkpoint says what its ``rope_theta`` should be.
    """
    path = make_sparse(kind, "20KB")
    expected = tensors_of(path)
    checkpoint = open_checkpoint(path)
    weights = {module: checkpoint.weight(module) for module in checkpoint.formats}
    files = [*sorted(path.glob("*.safetensors")), path / INDEX]
    draw = random.Random(20261123)
    refused = 0
    for _ in range(500):
        file = draw.choice(files)
        content = file.read_bytes()
        file.write_bytes(mutate(content, draw))
        try:
            found = open_checkpoint(path)
            read = {name: found.read(name) for name in found.where}
            dense = {module: found.weight(module) for module in found.formats}
        except ValueError:
            refused += 1
        else:
            assert read.keys() == expected.keys()
            for name, tensor in read.items():
                assert_same_bits(tensor, expected[name])
            for module, weight in dense.items():
                assert_same_bits(weight, weights[module])
        finally:
            file.write_bytes(content)
    assert refused > 450
    assert verify(path).good
