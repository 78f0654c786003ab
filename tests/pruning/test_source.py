# SPDX-License-Identifier: Apache-2.0
"""What the model's folder holds is looked at before any work."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nm_permute_plugin.pruning.run import PrunePlan
from nm_permute_plugin.pruning.settings import Settings

SEARCH = {"method": "search"}
CASES = {
    # A bias that the config leaves out, inside of what moves.
    "model.layers.0.mlp.gate_proj.bias": (
        (48,),
        ["hidden", "value"],
        r"gate_proj\.bias \[48\], which .* space hidden\.0 move\. "
        r"Write `spaces: \[residual, value\]`",
    ),
    "model.layers.1.self_attn.v_proj.bias": (
        (16,),
        ["hidden", "value"],
        r"space value\.1 move\. Write `spaces: \[residual, hidden\]`",
    ),
    "draft.eh_proj.weight": (
        (64, 7),
        ["residual"],
        r"space residual move\. Write `spaces: \[hidden, value\]`",
    ),
}


def add(folder: Path, name: str, shape: tuple[int, ...]) -> Path:
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: torch.rand(shape)}, file, {"format": "pt"})
    return folder


def plan(folder: Path, **settings: object) -> PrunePlan:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return PrunePlan.of(model, Settings(**SEARCH | settings))


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_that_lies_where_channels_move_is_refused(
    tiny_checkpoint, name: str
) -> None:
    shape, spaces, said = CASES[name]
    folder = add(tiny_checkpoint(), name, shape)
    with pytest.raises(ValueError, match=said):
        plan(folder, spaces=spaces)
    rest = {"residual", "hidden", "value"} - set(spaces)
    assert plan(folder, spaces=sorted(rest)).source.carried == (name,)


def test_a_tensor_that_no_moving_axis_is_as_long_as_is_carried(tiny_checkpoint) -> None:
    folder = add(tiny_checkpoint(), "extra.table", (48, 7))
    assert plan(folder).source.carried == ("extra.table",)


def test_a_module_that_reads_the_outputs_is_refused_where_they_move(
    tiny_checkpoint,
) -> None:
    folder = tiny_checkpoint()
    (folder / "2_Dense").mkdir()
    save_file({"w": torch.ones(2)}, folder / "2_Dense" / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps([{"path": "2_Dense"}]))
    said = r"names 2_Dense/model\.safetensors, .* Write `spaces: \[hidden, value\]`"
    with pytest.raises(ValueError, match=said):
        plan(folder)
    assert plan(folder, spaces=["hidden", "value"]).source.path == folder


def test_a_model_without_a_folder_has_no_source(tiny_model) -> None:
    assert PrunePlan.of(tiny_model("llama"), Settings(**SEARCH)).source is None


def test_a_damaged_record_is_refused(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    (folder / "nm_permute").mkdir()
    (folder / "nm_permute" / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"nm_permute is no whole record of a run"):
        plan(folder)
