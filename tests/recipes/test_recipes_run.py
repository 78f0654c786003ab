# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe runs, and what it leaves passes ``verify`` and is read back."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nm_permute_plugin.checkpoint.verify import verify

pytestmark = pytest.mark.slow

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
LINEARS = 14
# Groups of 4-bit weights have 128 channels.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_recipe_leaves_a_checkpoint_without_fault(
    tiny_checkpoint, run_oneshot, tokens, tmp_path: Path, file: Path
) -> None:
    name, out = file.stem, tmp_path / "out"
    folder = tiny_checkpoint(**(WIDE if name.endswith("w4a16") else {}))
    recipe = file.read_text().replace(
        "method: learned", "method: learned\n      steps: 2"
    )
    run_oneshot(folder, recipe, out)

    report = verify(out)
    assert report.faults == ()
    promised = [row for row in report.rows if row.promised]
    assert len(promised) == LINEARS
    assert all(row.sparse and row.zeros >= 0.5 for row in promised)
    stored, reason = {
        "2of4_learned_then_w4a16": ("packed", "formats cannot hold pack-quantized"),
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
