# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe runs; what it leaves passes ``verify``, and fails with a fault."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nm_permute_plugin.checkpoint.verify import verify

pytestmark = pytest.mark.slow

ALL = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
# Those for images are run beside, shards by several processes in tests/ranks, and what
# leaves linears dense below.
OTHERS = ("vit", "qwen25vl", "sharded", "budget")
FILES = [file for file in ALL if not file.stem.endswith(OTHERS)]
LINEARS = 14
MODULE = "model.layers.1.mlp.down_proj"
# Groups of 4-bit weights have 128 channels.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_recipe_leaves_what_verify_passes_and_transformers_reads(
    tiny_checkpoint, run_oneshot, tokens, tmp_path: Path, file: Path
) -> None:
    name, out = file.stem, tmp_path / "out"
    folder = tiny_checkpoint(**(WIDE if name.endswith("w4a16") else {}))
    recipe = re.sub(r"steps: \d+", "steps: 2", file.read_text())
    if "learn: {" in recipe and "learn: {steps" not in recipe:
        recipe = recipe.replace("learn: {", "learn: {steps: 2, ")
    elif "learn: {" not in recipe:
        recipe = recipe.replace(
            "method: learned", "method: learned\n      learn: {steps: 2}"
        )
    run_oneshot(folder, recipe, out)

    report = verify(out)
    assert report.faults == ()
    promised = [row for row in report.rows if row.promised]
    assert len(promised) == LINEARS
    assert all(row.sparse and row.zeros >= 0.5 for row in promised)
    packed = ("packed", "formats cannot hold pack-quantized")
    stored, reason = {
        "2of4_learned_then_w4a16": packed,
        "2of4_learned_then_recover_then_w4a16": packed,
        "4of8_learned": ("dense", "zeros included: the default for 4:8"),
    }.get(name, ("sparse-24-bitmask", "the default for 2:4"))
    assert {row.format for row in promised} == {stored}
    card = (out / "README.md").read_text()
    assert reason in card
    assert (out / "recipe.yaml").read_text().strip() in card
    (head,) = [row for row in report.rows if row.module == "lm_head"]
    assert head.zeros < 0.05

    # the fold and the mask cost something, a scrambled reading would cost everything
    with torch.no_grad():
        dense, ours = (
            AutoModelForCausalLM.from_pretrained(path, dtype="auto")(tokens).logits
            for path in (folder, out)
        )
    cosine = torch.nn.functional.cosine_similarity(dense, ours, dim=-1)
    assert float(cosine.mean()) > 0.5

    (out / "nm_permute" / "checksums.json").unlink()  # it would find any change
    plant_fault(out / "model.safetensors")
    (fault,) = verify(out).faults
    assert (fault.file, fault.tensor) == ("model.safetensors", MODULE)


def plant_fault(file: Path) -> None:
    """Have more weights in the first group of a row than the pattern allows."""
    tensors = load_file(file)
    part = next(
        part
        for part in ("bitmask", "weight_packed", "weight")
        if f"{MODULE}.{part}" in tensors
    )
    # all bits of a byte; eight 4-bit levels that are not zero; eight ones
    many = {"bitmask": 0xFF, "weight_packed": 0x11111111, "weight": 1}[part]
    tensors[f"{MODULE}.{part}"][3, 0 : 8 if part == "weight" else 1] = many
    save_file(tensors, file, {"format": "pt"})


def test_a_budget_leaves_whole_groups_dense_in_the_checkpoint(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    folder, out = tiny_checkpoint(), tmp_path / "out"
    (file,) = [file for file in ALL if file.stem.endswith("budget")]
    steps = "method: learned\n      learn: {steps: 2}"
    run_oneshot(folder, file.read_text().replace("method: learned", steps), out)
    report = verify(out)
    assert report.faults == ()
    rows = {row.module: row for row in report.rows if ".layers." in row.module}
    dense = {name for name, row in rows.items() if row.zeros < 0.05}
    assert 0 < len(dense) < LINEARS
    budget = json.loads((out / "nm_permute" / "report.json").read_text())["budget"]
    groups = [set(g["linears"]) for g in budget["groups"] if g["stays_dense"]]
    assert dense == set().union(*groups)
    assert 0.05 < budget["chosen"]["dense_share"] <= 0.2
    assert {n for n, row in rows.items() if row.promised} == rows.keys() - dense
    config = json.loads((out / "config.json").read_text())
    block = config["quantization_config"]["sparsity_config"]
    assert set(block["targets"]) == rows.keys() - dense
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    for name in rows:
        zeros = float((model.get_submodule(name).weight == 0).float().mean())
        assert (zeros < 0.05) == (name in dense)
