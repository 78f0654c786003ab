# SPDX-License-Identifier: Apache-2.0
"""A run leaves a finished checkpoint, or nothing at all."""

import json
import os
from pathlib import Path

import pytest
import torch
from commands import assert_one_error, listing, nm_permute, prune
from helpers import TURNS, begin_texts_with, give_template
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.cli.prune import calibration_rows, prune_checkpoint
from nm_permute_plugin.evaluation.corpus import Corpus

ROWS = [list(range(32))] * 10


@pytest.fixture
def before(tiny_checkpoint, recipe: Path, tmp_path: Path) -> list[str]:
    """What the working folder holds at first: the model and the recipe."""
    tiny_checkpoint()
    return listing(tmp_path)


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_run_writes_the_folder_and_nothing_beside_it(
    before: list[str], recipe: Path, tmp_path: Path, assert_exactly, there: bool
) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    minutes = prune_checkpoint(tmp_path / "dense", recipe, out, ROWS, "cpu")
    assert minutes > 0
    names = [path.name for path in out.iterdir()]
    assert {"config.json", "model.safetensors", "recipe.yaml"} <= set(names)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(names)
    kept = [name for name in listing(tmp_path) if not name.startswith("out")]
    assert kept == before
    assert_exactly(AutoModelForCausalLM.from_pretrained(out))


def test_a_gpt2_is_pruned_by_the_same_recipe(
    before: list[str], recipe: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(vocab_size=48, bos_token_id=1, eos_token_id=2, **size)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "gpt2")
    prune_checkpoint(tmp_path / "gpt2", recipe, tmp_path / "out", ROWS, "cpu")
    assert verify(tmp_path / "out").good
    for block in AutoModelForCausalLM.from_pretrained(tmp_path / "out").transformer.h:
        for conv1d in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_proj):
            kept = (conv1d.weight != 0).unflatten(0, (-1, 4)).sum(1)
            assert kept.eq(2).all()


def test_missing_parents_are_made(
    before: list[str], recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a" / "b" / "out"
    prune_checkpoint(tmp_path / "dense", recipe, out, ROWS, "cpu")
    assert (out / "model.safetensors").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_folder_may_be_read_by_whom_a_plain_one_may(
    before: list[str], recipe: Path, tmp_path: Path
) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    plain.mkdir()
    prune_checkpoint(tmp_path / "dense", recipe, out, ROWS, "cpu")
    assert oct(out.stat().st_mode) == oct(plain.stat().st_mode)


def test_a_link_to_an_empty_folder_is_filled(
    before: list[str], recipe: Path, tmp_path: Path
) -> None:
    real, out = tmp_path / "real", tmp_path / "out"
    real.mkdir()
    out.symlink_to(real)
    prune_checkpoint(tmp_path / "dense", recipe, out, ROWS, "cpu")
    assert (out / "model.safetensors").exists()


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(
    before: list[str], recipe: Path, full_disk: Path
) -> None:
    # A mounted volume cannot be renamed onto; the work of hours would be lost.
    with pytest.raises(ValueError, match="is a mount point"):
        prune_checkpoint(recipe.parent / "dense", recipe, full_disk, ROWS, "cpu")
    assert list(full_disk.iterdir()) == []


def test_a_folder_that_holds_files_is_refused_and_left_alone(
    before: list[str], recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        prune_checkpoint(tmp_path / "dense", recipe, out, ROWS, "cpu")
    assert listing(tmp_path) == sorted([*before, "out", "out/mine.txt"])


def test_a_file_in_the_place_of_the_folder_is_refused(
    before: list[str], recipe: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"recipe\.yaml exists and is not"):
        prune_checkpoint(tmp_path / "dense", recipe, recipe, ROWS, "cpu")
    assert listing(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_refused(
    before: list[str], recipe: Path, tmp_path: Path
) -> None:
    # Root may write anywhere, but not below a regular file.
    with pytest.raises(ValueError, match=r"cannot write to .*recipe\.yaml"):
        prune_checkpoint(tmp_path / "dense", recipe, recipe / "out", ROWS, "cpu")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [([[1, 48] * 20] * 10, "token 48"), ([[1, 2, 3]] * 10, "holds 30 tokens")],
    ids=["unknown token", "too few"],
)
def test_a_failure_in_the_middle_leaves_nothing(
    before: list[str], recipe: Path, tmp_path: Path, rows, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(tmp_path / "dense", recipe, tmp_path / "out", rows, "cpu")
    assert listing(tmp_path) == before


def test_a_model_that_is_none_leaves_nothing(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    before = listing(tmp_path)
    with pytest.raises((OSError, ValueError)):
        prune_checkpoint(tmp_path / "dense", recipe, tmp_path / "out", ROWS, "cpu")
    assert listing(tmp_path) == before


def test_a_bad_recipe_is_refused_before_the_model_is_read(
    recipe: Path, tmp_path: Path
) -> None:
    recipe.write_text("prune: {}")
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        prune_checkpoint(tmp_path / "none", recipe, tmp_path / "out", ROWS, "cpu")
    assert listing(tmp_path) == ["recipe.yaml"]


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    before: list[str], recipe: Path, full_disk: Path
) -> None:
    model = recipe.parent / "dense"
    with pytest.raises(ValueError, match="the disk of .*small has 33 kB free"):
        prune_checkpoint(model, recipe, full_disk / "out", ROWS, "cpu")
    assert list(full_disk.iterdir()) == []


def test_a_disk_that_fills_meanwhile_is_an_os_error_and_leaves_nothing(
    before: list[str], recipe: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = recipe.parent / "dense"
    # What others write while the run goes on is not there when it begins.
    monkeypatch.setattr("nm_permute_plugin.modifiers.preflight.no_room", lambda *_: ())
    with pytest.raises(OSError, match="No space left|os error 28"):
        prune_checkpoint(model, recipe, full_disk / "out", ROWS, "cpu")
    assert list(full_disk.iterdir()) == []
    assert os.statvfs(full_disk).f_bfree > 0


def test_rows_are_cut_one_after_the_other(tiny_checkpoint, chain_rows, words) -> None:
    tokens = chain_rows(1, 70, seed=0)[0]
    rows = calibration_rows(tiny_checkpoint(), Corpus(words(tokens)), 99, 20)
    assert torch.equal(torch.tensor(rows), tokens[:60].view(3, 20))


def test_rows_are_spread_evenly_over_all_texts(
    tiny_checkpoint, chain_rows, words
) -> None:
    texts = [words(chain_rows(1, 400, seed=seed)) for seed in range(2)]
    folder, corpus = tiny_checkpoint(), Corpus("\n\n".join(texts))
    every = calibration_rows(folder, corpus, samples=99, sequence_length=20)
    some = calibration_rows(folder, corpus, samples=5, sequence_length=20)
    assert len(every) == 40
    assert some == [every[i] for i in (0, 9, 19, 29, 39)]


@pytest.mark.parametrize("text", ["", " \n\n", "\t"])
def test_text_of_blanks_is_refused(tiny_checkpoint, text: str) -> None:
    with pytest.raises(ValueError, match="calibration text is empty"):
        calibration_rows(tiny_checkpoint(), Corpus(text), 8, 16)


def test_text_of_less_than_two_rows_is_refused(tiny_checkpoint) -> None:
    with pytest.raises(ValueError, match="has 31 tokens, fewer than two rows of 16"):
        calibration_rows(tiny_checkpoint(), Corpus("w05 " * 31), 8, 16)


def test_the_default_row_is_what_the_model_can_read(
    older_checkpoint, recipe: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = older_checkpoint(positions=48)
    words = ["prune", folder, recipe, tmp_path / "out", "--text", text_file]
    refused = nm_permute(*words, "--device", "cpu", "--sequence-length", 64)
    assert_one_error(
        refused, "48 learned positions .* give --sequence-length 48 or less"
    )
    assert not (tmp_path / "out").exists()
    result = nm_permute(*words, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"out: calibrated on {1280 // 48 * 48} tokens" in result.stdout


def test_rows_that_begin_as_the_tokenizer_does_give_other_weights(
    ready: list[str], text_file: Path, tmp_path: Path
) -> None:
    assert prune(tmp_path, "--text", text_file).exit_code == 0
    begin_texts_with(tmp_path / "dense", "w03")
    result = prune(tmp_path, "--text", text_file, out=tmp_path / "begun")
    assert result.exit_code == 0, result.output
    assert f"begun: calibrated on {1280 // 31 * 32} tokens" in result.stdout
    plain, begun = (
        load_file(tmp_path / name / "model.safetensors") for name in ("out", "begun")
    )
    assert any(not torch.equal(begun[name], plain[name]) for name in plain)


def test_conversations_calibrate(
    ready: list[str], chain_rows, words, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jsonl"
    said = [words(row) for row in chain_rows(20, 40, seed=3)]
    lines = [{"messages": [{"role": "user", "content": text}]} for text in said]
    file.write_text("\n".join(map(json.dumps, lines)))
    refused = prune(tmp_path, "--text", file)
    assert_one_error(refused, r"chat\.jsonl line 1 holds messages, .* no chat template")
    give_template(tmp_path / "dense", TURNS)
    result = prune(tmp_path, "--text", file)
    assert result.exit_code == 0, result.output
    # A word for whose turn it is and 40 that are said, in rows of at most 32.
    assert f"out: calibrated on {20 * 41} tokens" in result.stdout
    assert verify(tmp_path / "out").good
