# SPDX-License-Identifier: Apache-2.0
"""A save is held to the pattern, and is there whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from helpers import ours, quantize, wanda
from loguru import logger
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from nm_permute_plugin._words import file_size
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.modifiers.save import after_save

pytestmark = pytest.mark.slow

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
BROKEN = (
    r"model\.layers\.\d+\.\S+ is not 2:4 any more: row \d+, channels \d+\.\.\d+ hold"
)


def recipe(
    pattern: str = "2:4",
    method: str = "identity",
    prune: bool = True,
    format: str = "auto",
) -> str:
    return ours(mask_structure=pattern, method=method, prune=prune, format=format)


def fill(model: PreTrainedModel) -> None:
    """Do as a later step does that does not know of the zeros."""
    linear = model.model.layers[1].self_attn.o_proj
    with torch.no_grad():
        linear.weight.fill_(linear.weight.abs().max())


@pytest.mark.parametrize("format", ["auto", "dense"])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_zeros_that_are_filled_later_are_refused(
    tiny_checkpoint, run_oneshot, tmp_path: Path, scheme: str, format: str
) -> None:
    out = tmp_path / "out"
    both = recipe(format=format) + quantize(scheme)
    model = run_oneshot(tiny_checkpoint(**WIDE), both)
    fill(model)
    with pytest.raises(ValueError, match=BROKEN):
        model.save_pretrained(out)
    assert not out.exists()


def test_a_refused_save_leaves_the_older_checkpoint_as_it_was(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    folder, out = tiny_checkpoint(**WIDE), tmp_path / "out"
    run_oneshot(folder, recipe(), out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    model = run_oneshot(folder, recipe() + quantize("W8A8"))
    fill(model)
    with pytest.raises(ValueError, match=BROKEN):
        model.save_pretrained(out)
    after = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert after == before
    assert verify(out).good


@pytest.mark.parametrize(
    ("pattern", "scheme", "stored"),
    [
        ("2:4", "W4A16", "packed"),
        ("2:4", "W4A16_ASYM", "packed"),
        ("2:4", "NVFP4A16", "packed"),
        ("4:8", "W8A8", "dense"),
        ("4:8", "FP8_DYNAMIC", "dense"),
    ],
)
def test_a_quantizer_that_keeps_the_zeros_is_saved(
    tiny_checkpoint, run_oneshot, tmp_path: Path, pattern: str, scheme: str, stored: str
) -> None:
    both = recipe(pattern) + quantize(scheme)
    run_oneshot(tiny_checkpoint(**WIDE), both, tmp_path / "out")
    report = verify(tmp_path / "out")
    assert report.faults == ()
    assert [row.format for row in report.rows if row.promised] == [stored] * 14
    assert all(row.zeros > 0.45 for row in report.rows if row.promised)


@pytest.mark.parametrize("format", ["auto", "dense"])
def test_a_module_that_the_hosts_pruner_leaves_out_is_refused(
    tiny_checkpoint, run_oneshot, tmp_path: Path, format: str
) -> None:
    folded = recipe(method="search", prune=False, format=format)
    host = wanda(ignore=["re:.*lm_head", "re:.*o_proj"])
    with pytest.raises(
        ValueError, match=r"o_proj is not 2:4 any more: row 0, .* hold 4"
    ):
        run_oneshot(tiny_checkpoint(), folded + host, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_host_must_prune_the_pattern_that_the_order_is_made_for(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    folded = recipe("4:8", method="search", prune=False)
    with pytest.raises(ValueError, match="WandaPruningModifier after .* prunes '2:4'"):
        run_oneshot(tiny_checkpoint(), folded + wanda(), tmp_path / "out")


def test_a_head_that_is_the_embedding_is_refused_before_the_long_work(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head shares its weight with the emb"):
        run_oneshot(folder, ours(method="identity", ignore=[]), tmp_path / "out")


def test_a_fold_alone_promises_nothing(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_oneshot(tiny_checkpoint(), recipe(method="search", prune=False), out)
    report = verify(out)
    assert report.good
    assert not any(row.promised for row in report.rows)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert "Nothing is pruned" in (out / "README.md").read_text()


def test_other_patterns_may_be_stored_by_the_general_format(
    tiny_checkpoint, run_oneshot, assert_exactly, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_oneshot(tiny_checkpoint(), recipe("4:8", format="sparse-bitmask"), out)
    report = verify(out)
    assert report.faults == ()
    assert [r.format for r in report.rows if r.promised] == ["sparse-bitmask"] * 14
    assert_exactly(AutoModelForCausalLM.from_pretrained(out, dtype="auto"), "4:8")


def test_a_foreign_readme_is_kept_and_ours_replaced(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    folder, out = tiny_checkpoint(), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("# Mine\n")
    (out / "notes.txt").write_text("mine too")
    model = run_oneshot(folder, recipe(), out)
    assert (out / "README.old.md").read_text() == "# Mine\n"
    assert (out / "notes.txt").read_text() == "mine too"
    (out / "README.md").write_text((out / "README.md").read_text() + "stale\n")
    model.save_pretrained(out)
    assert "stale" not in (out / "README.md").read_text()
    assert sorted(file.name for file in out.glob("README*")) == [
        "README.md",
        "README.old.md",
    ]


def test_shards_of_an_older_save_do_not_stay(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model = run_oneshot(tiny_checkpoint(), recipe())
    model.save_pretrained(out, max_shard_size="20KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    model.save_pretrained(out)
    assert [file.name for file in out.glob("model*")] == ["model.safetensors"]
    assert verify(out).good
    assert (
        sum(n.endswith(".bitmask") for n in load_file(out / "model.safetensors")) == 14
    )


def test_an_upload_of_what_is_unfinished_is_refused(
    tiny_checkpoint, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint())
    after_save(model, lambda folder: None)
    with pytest.raises(ValueError, match="save it, then upload"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="hf upload REPOSITORY FOLDER"):
        model.push_to_hub("somebody/model")


def test_a_save_ends_with_its_size_and_what_to_do_next(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    said: list[str] = []
    folder, out = tiny_checkpoint(**WIDE), tmp_path / "out"
    sink = logger.add(said.append, format="{message}")
    run_oneshot(folder, recipe(), out)
    logger.remove(sink)
    (line,) = [line for line in said if "; next: " in line]
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert line.startswith(f"{out}: {file_size(size)}, ")
    assert (
        "of the wanda score kept by the best masks; next: nm-permute evaluate" in line
    )
    assert f"--dense {folder}" in line
