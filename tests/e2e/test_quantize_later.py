# SPDX-License-Identifier: Apache-2.0
"""A pruned checkpoint that a later session quantizes says that it is still 2:4."""

import json
from pathlib import Path

import pytest
import torch
from helpers import quantize
from transformers import AutoModelForCausalLM

import nm_permute_plugin as nmp
from nm_permute_plugin.checkpoint.record import read_record

pytestmark = pytest.mark.slow


def later(scheme: str) -> str:
    """A recipe that quantizes, and knows nothing of us."""
    return "quantize_stage:\n" + quantize(scheme)


@pytest.fixture
def pruned(tiny_checkpoint, chain_rows, tmp_path: Path) -> dict[str, Path]:
    """The folders of a pruned model, sparse and dense, with their tokenizer."""
    dense = tiny_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(dense)
    rows = [{"input_ids": chain_rows(12, 32, seed=999)}]
    done = nmp.prune(
        model, nmp.read_samples(model, rows), nmp.Settings(method="search")
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "sparse").mkdir(exist_ok=True)
        (tmp_path / "sparse" / name).write_text((dense / name).read_text())
    nmp.save(model, tmp_path / "sparse", done)
    nmp.convert(tmp_path / "sparse", tmp_path / "stored", "dense")
    return {"sparse": tmp_path / "sparse", "dense": tmp_path / "stored"}


def block(folder: Path) -> dict:
    config = json.loads((folder / "config.json").read_text())
    found: dict = config["quantization_config"]["sparsity_config"]
    return found


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
def test_the_claim_is_kept_and_true(
    pruned: dict[str, Path], run_oneshot, tmp_path: Path, form: str, scheme: str
) -> None:
    out = tmp_path / "out"
    run_oneshot(pruned[form], later(scheme), out)
    report = nmp.verify(out, pattern=nmp.NMPattern(2, 4))
    assert report.good, report.faults
    assert sum(row.promised and row.dtype.itemsize == 1 for row in report.rows) == 14
    assert block(out)["format"] == "sparse-24-bitmask"
    perms, told = read_record(out)
    before, _ = read_record(pruned[form])
    assert told["changed_later"] is True
    assert all(torch.equal(perms[name], perm) for name, perm in before.items())
    nmp.convert(out, tmp_path / "back", "dense")
    logits = [
        AutoModelForCausalLM.from_pretrained(path)(torch.arange(9)[None]).logits
        for path in (out, tmp_path / "back")
    ]
    assert torch.equal(*logits)


def test_a_save_by_hand_after_it_says_so_too(
    pruned: dict[str, Path], run_oneshot, tmp_path: Path
) -> None:
    model = run_oneshot(pruned["sparse"], later("FP8_DYNAMIC"))
    nmp.save(model, tmp_path / "out")
    assert sum(row.promised for row in nmp.verify(tmp_path / "out").rows) == 14
    assert nmp.verify(tmp_path / "out").good


def test_a_model_that_is_not_2of4_any_more_promises_nothing(
    pruned: dict[str, Path], run_oneshot, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned["sparse"])
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1)
    run_oneshot(pruned["sparse"], later("FP8_DYNAMIC"), tmp_path / "out", model=model)
    assert block(tmp_path / "out") == {}
    report = nmp.verify(tmp_path / "out")
    assert report.good
    assert not any(row.promised for row in report.rows)
    assert not (tmp_path / "out" / "nm_permute").exists()


def test_a_dense_model_is_saved_as_ever(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    run_oneshot(tiny_checkpoint(), later("FP8_DYNAMIC"), tmp_path / "out")
    assert block(tmp_path / "out") == {}
    assert not (tmp_path / "out" / "README.md").exists()
