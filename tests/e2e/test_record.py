# SPDX-License-Identifier: Apache-2.0
"""A checkpoint keeps the record of its run, and the orders in it undo the fold."""

from pathlib import Path

import pytest
import torch
from helpers import ours
from safetensors.torch import load_file

from nm_permute_plugin.checkpoint.record import read_record
from nm_permute_plugin.maths.permutation import invert

pytestmark = pytest.mark.slow


def test_the_recorded_orders_are_those_of_the_weights(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    folder, out = tiny_checkpoint(), tmp_path / "out"
    model = run_oneshot(folder, ours(method="search", prune=False, seed=3), out)
    perms, report = read_record(out)
    assert set(perms) == {"residual", "hidden.0", "hidden.1", "value.0", "value.1"}
    before = load_file(folder / "model.safetensors")
    after = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    rows, columns = invert(perms["residual"]), invert(perms["hidden.1"])
    assert torch.equal(after[name][rows][:, columns], before[name])
    best = min(report["history"], key=lambda look: look["validation"])
    assert torch.equal(after[name], before[name]) == (best["round"] == 0)

    assert report["modifier"]["seed"] == 3
    assert report["pruned"] == []
    assert 0 <= report["fold_error"] < 1e-3
    assert {"statistics", "search", "fold"} == set(report["seconds"])
    assert set(report["versions"]) >= {"nm-permute-plugin", "llmcompressor"}

    # A save by hand keeps it too.
    model.save_pretrained(tmp_path / "again")
    assert read_record(tmp_path / "again")[1] == report


def test_a_checkpoint_without_a_record_is_an_error(tiny_checkpoint) -> None:
    with pytest.raises(FileNotFoundError, match=r"report\.json"):
        read_record(tiny_checkpoint())
